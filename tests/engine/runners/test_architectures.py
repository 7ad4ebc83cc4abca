"""Each architecture writes what ``generate`` writes, or is refused with the reason."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from amusd.engine.interface import EngineOptions, Numerics
from amusd.engine.loading.context_length import context_length
from amusd.engine.loading.model_source import LoadedModel
from amusd.engine.model_engine import serve
from amusd.fleet.model_description import ModelDescription
from amusd.fleet.vocabulary import Vocabulary
from amusd.protocol.errors import InvalidInputError
from tests import tiny
from tests.engine.concurrent_sessions import write_together

COMMON = tiny.COMMON | tiny.NO_SPECIAL
SMALL: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, **tiny.NO_SPECIAL}
ORIGINAL = 40  # context of the rope variants before they are extended
NUM_TOKENS = 30
TEXT = [(i * 37 + i * i * 5 + 11) % 256 for i in range(150)]
PROMPTS = [TEXT[:30], TEXT[:3], TEXT[20:90], TEXT[:52], TEXT[90:105]]
"""They start before and after the original context, and share prefixes."""


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_theta": 10_000.0, **parameters}


LONGROPE = rope(
    rope_type="longrope",
    short_factor=[1.0] * 8,
    long_factor=[8.0] * 8,
    original_max_position_embeddings=ORIGINAL,
)
YARN = rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=ORIGINAL)
LLAMA3 = rope(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=ORIGINAL,
)
PHI3 = COMMON | {"original_max_position_embeddings": ORIGINAL, "rope_parameters": LONGROPE}
LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4}

SERVED: dict[str, PreTrainedConfig] = {
    "longrope": Phi3Config(**PHI3, sliding_window=None),
    "longrope, sliding window": Phi3Config(**PHI3, sliding_window=50),
    "longrope, window over the context": Phi3Config(**PHI3, sliding_window=4000),
    "longrope, experts": PhimoeConfig(
        **PHI3 | {"rope_parameters": LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3}},
        num_local_experts=4,
        sliding_window=None,
    ),
    "yarn": LlamaConfig(**COMMON | {"max_position_embeddings": ORIGINAL}, rope_parameters=YARN),
    "llama3": LlamaConfig(**COMMON, rope_parameters=LLAMA3),
    "linear": LlamaConfig(**COMMON, rope_parameters=rope(rope_type="linear", factor=4.0)),
    "dynamic NTK": LlamaConfig(**COMMON, rope_parameters=rope(rope_type="dynamic", factor=4.0)),
    "sliding window": MistralConfig(**COMMON, sliding_window=25),
    "windows and softcaps": Gemma2Config(**COMMON, head_dim=16, sliding_window=25),
    "windows by layer": Gemma3TextConfig(
        **COMMON,
        head_dim=16,
        sliding_window=25,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "local attention": GPTNeoConfig(
        **SMALL | {"num_layers": 2, "num_heads": 4, "initializer_range": 0.3},
        attention_types=[[["global", "local"], 1]],
        window_size=25,
        intermediate_size=128,
    ),
    "alibi, MPT": MptConfig(
        vocab_size=256, d_model=64, n_heads=4, n_layers=2, max_seq_len=400, initializer_range=0.3
    ),
    "alibi, Bloom": BloomConfig(**SMALL, n_layer=2, n_head=4, initializer_range=0.3),
    "alibi, Falcon": FalconConfig(**SMALL | LAYERS, alibi=True, initializer_range=0.3),
    "learned positions": OPTConfig(
        **SMALL | LAYERS,
        ffn_dim=128,
        word_embed_proj_dim=64,
        max_position_embeddings=400,
        init_std=0.3,
    ),
    "parallel residual": GPTNeoXConfig(**COMMON | {"num_key_value_heads": 4}),
    "scaled logits": CohereConfig(**COMMON),
    "norms after": Olmo2Config(**COMMON),
    "experts": MixtralConfig(**COMMON, num_local_experts=4, sliding_window=None),
}
EXACT = {"yarn", "llama3", "linear", "dynamic NTK", "learned positions"} | {
    "parallel residual",
    "scaled logits",
    "norms after",
}
BATCHED = EXACT | {
    "longrope",
    "longrope, window over the context",
    "longrope, experts",
    "experts",
}

REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "Mamba": (MambaConfig(**SMALL, num_hidden_layers=2, state_size=8), "its recurrent state"),
    "RWKV": (
        RwkvConfig(**SMALL, attention_hidden_size=64, num_hidden_layers=2),
        "its recurrent state",
    ),
    "RecurrentGemma": (
        RecurrentGemmaConfig(
            **SMALL, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, lru_width=64
        ),
        "its recurrent state",
    ),
    "hybrid": (
        Lfm2Config(**COMMON, layer_types=["conv", "full_attention"]),
        "its recurrent state",
    ),
    "encoder": (
        BertConfig(**SMALL | LAYERS, intermediate_size=128),
        r"its logits differ from those of the model alone by .* \(an encoder\?",
    ),
}


def build(config: PreTrainedConfig) -> LoadedModel:
    torch.manual_seed(3)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.eval()  # type: ignore[no-untyped-call]
    description = ModelDescription(
        name="tiny",
        device="cpu",
        dtype="float32",
        num_parameters=sum(weight.numel() for weight in model.parameters()),
        context_length=context_length(model, "."),
        output_size=256,
        vocabulary=Vocabulary(0),
    )
    return LoadedModel(model, description)


def generated(loaded: LoadedModel, prompt: list[int]) -> list[int]:
    model: Any = loaded.model
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": None}
    with torch.inference_mode():
        found = model.generate(ids, attention_mask=mask, pad_token_id=0, **options)
    tokens: list[int] = found[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("name", SERVED)
def test_sessions_at_once_write_what_generate_writes(name: str) -> None:
    loaded = build(SERVED[name])
    expected = [generated(loaded, prompt) for prompt in PROMPTS]
    engine = serve(loaded, EngineOptions(max_batch=3, cache_mib=8))
    assert (engine.max_batch == 3) is (name in BATCHED)
    assert write_together(engine, PROMPTS, NUM_TOKENS) == expected
    options = EngineOptions(max_batch=3, cache_mib=8, numerics=Numerics.EXACT)
    if name in EXACT:
        assert write_together(serve(loaded, options), PROMPTS, NUM_TOKENS) == expected
    else:
        with pytest.raises(InvalidInputError, match="use numerics fast"):
            serve(loaded, options)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_rolled_back_is_refused_with_the_reason(name: str) -> None:
    config, reason = REFUSED[name]
    with pytest.raises(InvalidInputError, match=f"tiny cannot be served because {reason}") as found:
        serve(build(config))
    assert "\n" not in str(found.value)
