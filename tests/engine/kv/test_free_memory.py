"""How much memory is left, inside a container and outside."""

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


def test_without_a_container_it_is_what_the_system_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", Path("/nowhere"))
    assert free_bytes("cpu") > MIB


def test_a_containers_limit_counts_but_not_idle_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CGROUP", group(tmp_path, str(20 * MIB), 18 * MIB, 8 * MIB))
    assert free_bytes("cpu") == 10 * MIB
    group(tmp_path, str(20 * MIB), 30 * MIB, 0)
    assert free_bytes("cpu") == 0


def test_a_container_without_a_limit_leaves_what_the_system_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CGROUP", group(tmp_path, "max", 30 * MIB, 0))
    assert MIB < free_bytes("cpu") < 1 << 60
