"""Tiny models of several families, through real services, against Transformers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from amusd.client import Client, Options, Prompt
from amusd.core.strategy import Strategy
from tests.process.services import Starter, start_trio

pytestmark = [pytest.mark.process, pytest.mark.slow]

VOCABULARY = 256
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128}
HEADS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON = SIZES | HEADS | {"max_position_embeddings": 400, "initializer_range": 0.3}
NO_SPECIAL: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def build(family: str) -> PreTrainedModel:
    """Return a model of random weights, large enough that its outputs do not tie."""
    torch.manual_seed(3)
    match family:
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**COMMON, **NO_SPECIAL))
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**COMMON, **NO_SPECIAL))
        case "mistral":
            config = MistralConfig(**COMMON, **NO_SPECIAL, sliding_window=None)
            return MistralForCausalLM(config)
        case _:
            sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2}
            gpt2 = GPT2Config(
                **sizes, **NO_SPECIAL, n_head=4, n_positions=400, initializer_range=0.3
            )
            return GPT2LMHeadModel(gpt2)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]


def perturbed(model: PreTrainedModel, noise: float) -> PreTrainedModel:
    """Return a copy that agrees with ``model`` the less, the more noise there is."""
    torch.manual_seed(4)
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for weight in copy.parameters():
            weight.add_(noise * weight.std() * torch.randn_like(weight))
    return copy


def save(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def generate(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
        )
    return [int(token) for token in output[0, len(prompt) :]]


@pytest.fixture(params=["llama", "qwen2", "mistral", "gpt2"])
def served(
    request: pytest.FixtureRequest, tmp_path: Path, start: Starter
) -> Iterator[tuple[PreTrainedModel, Client]]:
    model = build(request.param)
    model.train(False)
    verify = save(model, tmp_path / "verify")
    draft = save(perturbed(model, 0.05), tmp_path / "draft")
    trio = start_trio(start, verify, draft)
    with Client(trio.orchestrator.address, timeout_seconds=60) as client:
        yield model, client


def test_every_strategy_writes_what_transformers_generates(
    served: tuple[PreTrainedModel, Client],
) -> None:
    model, client = served
    num_accepted = 0
    for length in (1, 20, 300):  # the last one is read in two pieces
        prompt = [(7 * index + length) % VOCABULARY for index in range(length)]
        expected = generate(model, prompt, 48)
        for strategy in Strategy:
            options = Options(strategy, 48, ignore_eos=True)
            generation = client.generate(Prompt(tokens=tuple(prompt)), options).wait()
            assert generation.tokens == expected
            assert not generation.summary().fallback_reason
            num_accepted += generation.summary().num_accepted
    assert num_accepted > 0
