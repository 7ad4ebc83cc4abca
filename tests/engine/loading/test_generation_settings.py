"""Generation settings that would change greedy output are named, and kept out of baselines."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from amusd.engine.loading.generation_settings import (
    explain_unapplied,
    unapplied_settings,
    use_plain_greedy,
)
from amusd.engine.loading.model_source import ModelSource, load_source
from tests import tiny

PROMPT = torch.tensor([[3, 1, 4, 1, 5]])

CHANGES: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.5,
    "suppress_tokens": [7],
    "begin_suppress_tokens": [7],
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 0,
    "min_length": 20,
    "min_new_tokens": 4,
    "bad_words_ids": [[7]],
    "sequence_bias": [[[7], -5.0]],
    "exponential_decay_length_penalty": [5, 1.1],
    "guidance_scale": 2.0,
    "num_beams": 2,
    "stop_strings": ["x"],
}


def settings(**values: Any) -> GenerationConfig:
    return GenerationConfig(**values)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", CHANGES)
def test_each_setting_that_changes_greedy_output_is_named(name: str) -> None:
    config = settings(**{name: CHANGES[name]})
    assert unapplied_settings(config) == {name: CHANGES[name]}
    said = explain_unapplied(config)
    assert said is not None
    assert f"not applied: {name}=" in said


@pytest.mark.parametrize(
    "harmless",
    [
        {},
        {"repetition_penalty": 1.0, "num_beams": 1, "min_length": 0, "suppress_tokens": []},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20},
        {"eos_token_id": [1, 2], "bos_token_id": 0, "pad_token_id": 3, "max_length": 100},
        {"guidance_scale": 1.0, "no_repeat_ngram_size": 0},
    ],
)
def test_settings_that_change_nothing_are_not_named(harmless: dict[str, Any]) -> None:
    assert explain_unapplied(settings(**harmless)) is None


def test_a_long_value_is_cut() -> None:
    said = explain_unapplied(settings(suppress_tokens=list(range(1000))))
    assert said is not None
    assert len(said) < 200


def test_a_baseline_is_measured_without_them() -> None:
    model: Any = tiny.build("llama")
    nn.Module.eval(model)
    plain = model.generate(PROMPT, max_new_tokens=12, do_sample=False)
    model.generation_config = settings(repetition_penalty=5.0, suppress_tokens=[7])
    penalized = model.generate(PROMPT, max_new_tokens=12, do_sample=False)
    assert not torch.equal(plain, penalized)
    use_plain_greedy(model, ())
    assert torch.equal(plain, model.generate(PROMPT, max_new_tokens=12, do_sample=False))
    output = plain[0, PROMPT.shape[1] :].tolist()
    use_plain_greedy(model, (output[4],))
    ended = model.generate(PROMPT, max_new_tokens=12, do_sample=False)[0, PROMPT.shape[1] :]
    assert ended.tolist() == output[: output.index(output[4]) + 1]


def test_a_verify_model_says_it_and_a_draft_does_not(tmp_path: Path) -> None:
    model = tiny.build("llama")
    model.generation_config = settings(repetition_penalty=1.3, eos_token_id=5)
    source = ModelSource("tiny", tiny.save(model, tmp_path))
    [remark] = load_source(source).remarks
    assert "repetition_penalty=1.3" in remark
    assert load_source(source, known_tokens_only=True).remarks == ()
