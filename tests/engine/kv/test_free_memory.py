"""The free memory of a device, inside and outside a container."""

from pathlib import Path

import pytest

from amusd.engine.kv import free_memory as memory
from amusd.engine.kv.free_memory import free_bytes

MIB = 1 << 20


def group(folder: Path, limit: str, used: int, idle_files: int) -> Path:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {idle_files}\nactive_file 7\n")
    return folder


def test_without_a_container_the_memory_of_the_system_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "_CGROUP", Path("/nowhere"))
    assert free_bytes("cpu") > MIB


def test_the_limit_of_a_container_counts_and_idle_files_are_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CGROUP", group(tmp_path, str(20 * MIB), 18 * MIB, 8 * MIB))
    assert free_bytes("cpu") == 10 * MIB
    group(tmp_path, str(20 * MIB), 30 * MIB, 0)
    assert free_bytes("cpu") == 0


def test_without_a_limit_of_the_container_the_memory_of_the_system_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CGROUP", group(tmp_path, "max", 30 * MIB, 0))
    assert MIB < free_bytes("cpu") < 1 << 60
