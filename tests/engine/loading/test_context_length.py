"""The context length of a model, under whatever name its configuration has it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
)

from amusd.engine.loading.context_length import context_length, rope_switch
from amusd.engine.loading.model_source import ModelSource, load_source
from amusd.protocol.errors import InvalidInputError
from tests import tiny
from tests.tiny import byte_tokenizer

NAMES = ["seq_length", "max_sequence_length", "max_seq_len", "n_ctx", "n_positions"]
COMMON = tiny.COMMON | tiny.NO_SPECIAL | {"max_position_embeddings": 100}


def bloom(**settings: Any) -> PreTrainedModel:
    config = BloomConfig(vocab_size=256, hidden_size=64, n_layer=1, n_head=4, **settings)
    return BloomForCausalLM(config)


def llama(**rope: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**COMMON, rope_parameters={"rope_theta": 1e4} | rope))


@pytest.mark.parametrize("name", [*NAMES, "model_max_length"])
def test_any_name_of_the_context_counts(name: str, tmp_path: Path) -> None:
    assert context_length(bloom(**{name: 77}), str(tmp_path)) == 77


def test_mpt_has_its_own_name() -> None:
    config = MptConfig(vocab_size=256, d_model=64, n_heads=4, n_layers=1, max_seq_len=64)
    assert context_length(MptForCausalLM(config), ".") == 64


@pytest.mark.parametrize("value", [-1, 0, True, None])
def test_a_name_without_a_length_does_not_count(value: int | None, tmp_path: Path) -> None:
    assert context_length(bloom(n_positions=value, seq_length=77), str(tmp_path)) == 77


def test_a_position_table_limits_what_the_configuration_says(tmp_path: Path) -> None:
    model = tiny.build("gpt2")
    model.config.n_positions = 4000
    assert context_length(model, str(tmp_path)) == 400


def test_without_a_name_the_tokenizer_decides(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"model_max_length": 88}))
    assert context_length(bloom(), str(tmp_path)) == 88


@pytest.mark.parametrize("content", ["{}", '{"model_max_length": 1e30}', "[]", "{"])
def test_without_any_limit_the_log_asks_for_one(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    assert context_length(bloom(), str(tmp_path)) == 1 << 20
    [record] = caplog.records
    assert "set --max-context" in record.getMessage()


def test_yarn_extends_the_context_and_other_variants_do_not() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}
    assert context_length(llama(**yarn), ".") == 400
    assert context_length(llama(**yarn | {"original_max_position_embeddings": 10}), ".") == 100
    assert context_length(llama(rope_type="linear", factor=4.0), ".") == 100
    assert context_length(llama(rope_type="dynamic", factor=4.0), ".") == 100


def test_longrope_is_not_extended_where_transformers_mixes_its_factors(
    caplog: pytest.LogCaptureFixture,
) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [8.0] * 8}
    model = llama(rope_type="longrope", original_max_position_embeddings=40, **factors)
    assert context_length(model, ".") == 40
    assert "sessions have up to 40 tokens" in caplog.text
    assert rope_switch(model, 40) is None
    assert rope_switch(model, 41) == 40


def test_a_model_with_an_encoder_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInputError, match="type t5 have an encoder") as found:
        load_source(ModelSource("t5", str(tmp_path)))
    assert "\n" not in str(found.value)
