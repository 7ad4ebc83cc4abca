"""A broken or odd model folder is refused in one line, before its weights where possible."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from amusd.engine.loading import model_source
from amusd.engine.loading.model_source import ModelSource, load_source
from amusd.engine.model_engine import load_engine
from amusd.protocol.errors import InvalidInputError
from tests import tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny.save(tiny.build("llama"), tmp_path_factory.mktemp("whole")))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes a key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def assert_refused(folder: Path, *parts: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        load_engine(ModelSource("tiny", str(folder)))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert "tiny" in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("config.json", None, ["there is no config.json"]),
        ("tokenizer.json", None, ["there is no tokenizer.json", "save_pretrained"]),
        ("config.json", "{", ["config.json is not valid JSON"]),
        ("config.json", "[]", ["config.json holds a list"]),
        ("config.json", b"\xff\xfe{", ["config.json is not UTF-8"]),
        ("generation_config.json", "{'eos_token_id': 2}", ["generation_config.json is not valid"]),
        ("generation_config.json", "7", ["generation_config.json holds a int"]),
        ("tokenizer.json", "{}", ["tokenizer.json cannot be used"]),
        ("tokenizer.json", "", ["tokenizer.json cannot be used"]),
        ("tokenizer_config.json", "nothing", ["tokenizer_config.json is not valid JSON"]),
    ],
)
def test_a_broken_file_is_named_before_the_weights_are_loaded(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: str | bytes | None,
    parts: list[str],
) -> None:
    def not_yet(*_: object) -> None:
        raise AssertionError("the weights are loaded too early")

    monkeypatch.setattr(model_source, "load_causal_lm", not_yet)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert_refused(folder, *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": None, "architectures": None}, []),
        ({"model_type": "no-such-model"}, ["no-such-model"]),
        ({"hidden_size": "64"}, ["hidden_size"]),
        ({"num_hidden_layers": 2.5}, ["num_hidden_layers"]),
        ({"num_hidden_layers": -1}, []),
        ({"hidden_act": "no-such-activation"}, ["no-such-activation"]),
        ({"vocab_size": 300}, ["does not fit the weights", "[256, 64]", "[300, 64]"]),
        ({"hidden_size": 32}, ["does not fit the weights"]),
        ({"num_hidden_layers": 3}, ["model.layers.2", "which the weights lack"]),
        ({"num_attention_heads": 3}, []),
        ({"tie_word_embeddings": "maybe"}, ["tie_word_embeddings"]),
        ({"rope_parameters": {"rope_type": "no-such-rope"}}, []),
        ({"rope_parameters": 5}, []),
        ({"max_position_embeddings": "many"}, ["max_position_embeddings"]),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_in_one_line(
    folder: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    edit(folder / "config.json", **changes)
    assert_refused(folder, *parts)


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _half_the_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")


def _one_weight_less(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    del state["model.norm.weight"]
    save_file(state, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (_no_weights, "model.safetensors"),
        (_half_the_weights, ""),
        (_no_safetensors, ""),
        (_one_weight_less, "model.norm.weight, which the weights lack"),
    ],
)
def test_broken_weights_are_refused_in_one_line(
    folder: Path, damage: Callable[[Path], None], part: str
) -> None:
    damage(folder)
    assert_refused(folder, part)


def test_weights_that_the_model_does_not_use_are_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(folder / "config.json", num_hidden_layers=1)
    load_source(ModelSource("tiny", str(folder)))
    assert "does not use model.layers.1." in caplog.text
    assert "and 8 more of its weights" in caplog.text


def test_a_draft_needs_no_tokenizer_json(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny.byte_tokenizer()
    (folder / "tokenizer.json").unlink()
    monkeypatch.setattr(
        "amusd.engine.loading.model_files.AutoTokenizer.from_pretrained", lambda _: tokenizer
    )
    loaded = load_source(ModelSource("tiny", str(folder)), known_tokens_only=True)
    assert loaded.description.vocabulary.size == tiny.VOCABULARY


def test_a_hole_in_the_vocabulary_is_served(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    moved = next(token for token, number in vocabulary.items() if number == 254)
    del vocabulary[moved]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    for known_tokens_only in (False, True):
        loaded = load_source(ModelSource("tiny", str(folder)), known_tokens_only)
        assert loaded.description.vocabulary.size == 256
        assert loaded.num_outputs == (256 if known_tokens_only else None)


@pytest.mark.parametrize("num_tokens", [200, 260])
def test_a_draft_samples_ids_that_head_and_tokenizer_have(folder: Path, num_tokens: int) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    kept = {token: number for token, number in vocabulary.items() if number < num_tokens}
    kept |= {f"more{number}": number for number in range(256, num_tokens)}
    content["model"]["vocab"] = kept
    (folder / "tokenizer.json").write_text(json.dumps(content))
    verify = load_source(ModelSource("tiny", str(folder)))
    draft = load_source(ModelSource("tiny", str(folder)), known_tokens_only=True)
    assert verify.description.vocabulary.size == num_tokens
    assert draft.num_outputs == min(num_tokens, 256)
    said = [remark for remark in verify.remarks if "prompts with the rest are refused" in remark]
    assert len(said) == (num_tokens > 256)


def test_an_end_of_text_id_of_another_type_is_refused(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=["2"])
    assert_refused(folder, "eos_token_id")


@pytest.mark.parametrize("changes", [{}, {"vocab_size": 300}, {"num_hidden_layers": 1}])
def test_loading_reports_of_transformers_are_kept_out_of_the_log(
    folder: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    edit(folder / "config.json", **changes)
    with contextlib.suppress(InvalidInputError):
        load_source(ModelSource("tiny", str(folder)))
    assert "[transformers]" not in capfd.readouterr().err
