import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from amusd.distill import cut
from amusd.protocol.errors import InvalidInputError
from tests import tiny


def three_layers() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**tiny.COMMON | {"num_hidden_layers": 3}, **tiny.NO_SPECIAL)
    )


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    nn.Module.eval(model)
    found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gpt2"])
def test_all_layers_and_the_whole_head_are_the_model_itself(family: str) -> None:
    model = tiny.build(family)
    ids = torch.arange(10)[None]
    draft = cut.cut(model, [0, 1], None)
    assert torch.allclose(logits(draft, ids), logits(model, ids), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gpt2"])
def test_a_reduced_head_has_the_rows_of_its_tokens(family: str) -> None:
    model = tiny.build(family)
    ids, tokens = torch.arange(10)[None], torch.tensor([200, 3, 77])
    whole = logits(cut.cut(model, [1], None), ids)
    reduced = logits(cut.cut(model, [1], tokens), ids)
    assert torch.allclose(reduced, whole[..., tokens], atol=1e-5)


def test_chosen_layers_are_taken_in_the_order_given() -> None:
    model = three_layers()
    draft = cut.cut(model, [2, 0], None).state_dict()
    ours = model.state_dict()
    name = "model.layers.{}.self_attn.q_proj.weight"
    assert torch.equal(draft[name.format(0)], ours[name.format(2)])
    assert torch.equal(draft[name.format(1)], ours[name.format(0)])
    assert name.format(2) not in draft


def test_layers_and_norm_are_trained_embedding_and_head_are_not() -> None:
    names = set(cut.trainable(cut.cut(three_layers(), [0], torch.arange(9))))
    assert "model.norm.weight" in names
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert not names & {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("layers", [[3], [-1], []])
def test_layers_that_are_not_there_are_refused(layers: list[int]) -> None:
    with pytest.raises(InvalidInputError, match="layers 0 to 2"):
        cut.cut(three_layers(), layers, None)


def test_more_layers_than_there_are_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="has 3 layers: choose 1 to 3, not 4"):
        cut.default_layers(3, 4)


def test_an_encoder_and_decoder_is_refused() -> None:
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    )
    with pytest.raises(InvalidInputError, match="cannot cut layers out of T5"):
        cut.layer_list(model)


def test_the_fingerprint_is_of_the_weights() -> None:
    one, other = three_layers(), three_layers()
    assert cut.fingerprint(one) == cut.fingerprint(other)
    with torch.no_grad():
        next(iter(other.parameters())).add_(1e-3)
    assert cut.fingerprint(one) != cut.fingerprint(other)
