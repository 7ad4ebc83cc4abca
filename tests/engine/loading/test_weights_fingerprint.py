"""Fingerprints of weights: equal for the same model, different for any other."""

from pathlib import Path

import torch

from amusd.engine.loading.model_source import ModelSource, load_source
from amusd.engine.loading.weights_fingerprint import weights_fingerprint
from amusd.engine.synthetic import SyntheticModel
from tests.tiny import build, byte_tokenizer


def test_the_same_model_has_the_same_fingerprint_under_any_name(tmp_path: Path) -> None:
    found = set()
    for name in ("here", "there"):
        build("llama").save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
        source = ModelSource(name, str(tmp_path / name))
        found.add(load_source(source).description.weights_fingerprint)
    assert len(found) == 1
    assert len(found.pop()) == 32


def test_other_weights_and_other_settings_have_another_fingerprint() -> None:
    model = build("llama")
    config = model.config.to_diff_dict()
    found = [weights_fingerprint(model, config)]
    found.append(weights_fingerprint(model, config | {"rms_norm_eps": 0.5}))
    found.append(weights_fingerprint(build("qwen2"), config))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)
    found.append(weights_fingerprint(model, config))
    assert len(set(found)) == len(found)


def test_the_origin_of_a_model_does_not_matter() -> None:
    model = build("gpt2")
    config = model.config.to_diff_dict()
    moved = config | {"_name_or_path": "/elsewhere", "transformers_version": "9", "x": object()}
    again = config | {"x": object()}
    assert weights_fingerprint(model, moved) == weights_fingerprint(model, again)


def test_the_fingerprint_of_a_synthetic_model_covers_what_changes_its_tokens() -> None:
    model = SyntheticModel(seed=1)
    assert model.fingerprint == SyntheticModel(seed=1, pass_ms=5.0, batch=4).fingerprint
    assert model.fingerprint != SyntheticModel(seed=2).fingerprint
