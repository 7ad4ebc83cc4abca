"""The cache's law: a folder is complete and current, or it is built again."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest

from amusd.pair.cache import (
    CACHE_VARIABLE,
    MANIFEST_NAME,
    cache_root,
    damaged_files,
    ensure_folder,
    is_current,
)
from amusd.pair.checkpoint import write_weights
from amusd.pair.pair_error import CacheError, PairError


class Writer:
    """Fills a folder with one file and counts how often it was asked to."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "weights").write_bytes(b"12345678")


def truncate(folder: Path) -> None:
    (folder / "weights").write_bytes(b"1234")


def remove(folder: Path) -> None:
    (folder / "weights").unlink()


def spoil_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_text("{", encoding="utf-8")


def empty_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_text("{}", encoding="utf-8")


def age_manifest(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(manifest | {"version": 0}), encoding="utf-8")


def test_the_environment_names_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv(CACHE_VARIABLE)
    assert cache_root().name == "amusd"


def test_a_whole_folder_is_built_once(tmp_path: Path) -> None:
    write = Writer()
    for _ in range(3):
        folder = ensure_folder(tmp_path / "model", "v1", write)
    assert write.calls == 1
    assert (folder / "weights").read_bytes() == b"12345678"
    assert damaged_files(folder) == []


def test_another_source_replaces_the_folder(tmp_path: Path) -> None:
    write = Writer()
    ensure_folder(tmp_path / "model", "v1", write)
    ensure_folder(tmp_path / "model", "v2", write)
    assert write.calls == 2


@pytest.mark.parametrize("damage", [truncate, remove, spoil_manifest, empty_manifest, age_manifest])
def test_a_damaged_folder_is_rebuilt(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write = Writer()
    folder = ensure_folder(tmp_path / "model", "v1", write)
    damage(folder)
    assert not is_current(folder, "v1")
    ensure_folder(folder, "v1", write)
    assert write.calls == 2
    assert is_current(folder, "v1")
    assert damaged_files(folder) == []


def test_a_flipped_byte_is_found_by_the_full_check(tmp_path: Path) -> None:
    folder = ensure_folder(tmp_path / "model", "v1", Writer())
    (folder / "weights").write_bytes(b"1234567X")
    assert damaged_files(folder) == ["weights"]
    (folder / MANIFEST_NAME).unlink()
    assert damaged_files(folder) == [MANIFEST_NAME]


def test_a_failed_build_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    folder = ensure_folder(tmp_path / "model", "v1", Writer())

    def fail(empty: Path) -> None:
        (empty / "half").touch()
        raise PairError("no")

    with pytest.raises(PairError):
        ensure_folder(folder, "v2", fail)
    assert is_current(folder, "v1")
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "model.lock"}


def test_what_a_killed_build_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".model-abc" / "new").mkdir(parents=True)
    ensure_folder(tmp_path / "model", "v1", Writer())
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "model.lock"}


def test_a_full_disk_is_a_cache_error(tmp_path: Path) -> None:
    def fill(empty: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CacheError, match=rf"No space left on device.*{CACHE_VARIABLE}"):
        ensure_folder(tmp_path / "model", "v1", fill)


def test_weights_that_cannot_be_written_are_a_cache_error(tmp_path: Path) -> None:
    def write(empty: Path) -> None:
        (empty / "model.safetensors").mkdir()
        write_weights(empty, {"x": np.zeros(4, np.float32)})

    with pytest.raises(CacheError, match=CACHE_VARIABLE):
        ensure_folder(tmp_path / "model", "v1", write)


def test_an_unusable_cache_is_a_cache_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match=CACHE_VARIABLE):
        ensure_folder(tmp_path / "file" / "model", "v1", Writer())


def test_builders_at_the_same_time_build_once(tmp_path: Path) -> None:
    write, start = Writer(), Barrier(4)

    def ensure(_: int) -> Path:
        start.wait()
        return ensure_folder(tmp_path / "model", "v1", write)

    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(ensure, range(4)))
    assert folders == {tmp_path / "model"}
    assert write.calls == 1
