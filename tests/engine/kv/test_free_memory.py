"""The free memory of a device, inside and outside a container."""

from pathlib import Path

import pytest

from amusd.engine.kv import free_memory as memory
from amusd.engine.kv.free_memory import free_bytes

MIB = 1 << 20


def test_without_a_limit_the_memory_of_the_system_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    assert free_bytes("cpu") == 2 * MIB


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tmp_path / "memory"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(f"{20 * MIB}\n")
    (group / "memory.usage_in_bytes").write_text(f"{5 * MIB}\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert free_bytes("cpu") == 15 * MIB
