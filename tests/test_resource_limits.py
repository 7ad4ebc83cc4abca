"""What control groups of both versions, nested, hybrid and in containers, leave to a process."""

import os
from pathlib import Path

import pytest

from amusd import resource_limits
from amusd.resource_limits import NO_LIMIT, cpu_quota, memory_left, usable_cpus

MIB = 1 << 20
V1_UNLIMITED = 9223372036854771712
UNIFIED = "30 23 0:26 {root} {mount} rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = "35 31 0:32 {root} {mount} rw,relatime shared:9 - cgroup cgroup rw,{controllers}\n"


def write(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        head, _, rest = name.partition("_")
        (folder / f"{head}.{rest}").write_text(f"{content}\n")
    return folder


def process(tmp_path: Path, cgroup: str, mountinfo: str) -> Path:
    """Return a folder like ``/proc/self``."""
    folder = tmp_path / "proc"
    folder.mkdir()
    (folder / "cgroup").write_text(cgroup)
    (folder / "mountinfo").write_text("21 1 8:1 / / rw - ext4 /dev/sda rw\n" + mountinfo)
    return folder


def v2(folder: Path, limit: object, used: int = 0, cpu: str = "max 100000", idle: int = 0) -> Path:
    stat = f"anon 5\ninactive_file {idle}\nactive_file 7"
    return write(folder, memory_max=limit, memory_current=used, memory_stat=stat, cpu_max=cpu)


def v1(folder: Path, limit: int, used: int = 0, stat: str = "inactive_file 1") -> Path:
    return write(folder, memory_limit_in_bytes=limit, memory_usage_in_bytes=used, memory_stat=stat)


def v1_cpu(folder: Path, quota: int, period: int = 100000) -> Path:
    return write(folder, cpu_cfs_quota_us=quota, cpu_cfs_period_us=period)


def test_without_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    assert memory_left(tmp_path, tmp_path / "mount") == NO_LIMIT
    assert cpu_quota(tmp_path, tmp_path / "mount") == float("inf")


@pytest.mark.parametrize("limit", ["max", V1_UNLIMITED])
def test_no_limit_and_the_largest_number_of_version_1_leave_more_than_any_machine_has(
    tmp_path: Path, limit: object
) -> None:
    v2(tmp_path / "a", limit)
    v1(tmp_path / "b" / "memory", V1_UNLIMITED, 5)
    assert memory_left(tmp_path, tmp_path / "a") > 1 << 60
    assert memory_left(tmp_path, tmp_path / "b") > 1 << 60


def test_idle_pages_of_files_are_free(tmp_path: Path) -> None:
    v2(tmp_path / "a", 20 * MIB, 18 * MIB, idle=8 * MIB)
    stat = f"inactive_file 5\ntotal_inactive_file {8 * MIB}"
    v1(tmp_path / "b" / "memory", 20 * MIB, 18 * MIB, stat)
    assert memory_left(tmp_path, tmp_path / "a") == 10 * MIB
    assert memory_left(tmp_path, tmp_path / "b") == 10 * MIB


def test_more_in_use_than_the_limit_leaves_nothing(tmp_path: Path) -> None:
    assert memory_left(tmp_path, v2(tmp_path / "a", 20 * MIB, 30 * MIB)) == 0


def test_the_throttling_limit_of_version_2_counts(tmp_path: Path) -> None:
    write(v2(tmp_path / "a", 20 * MIB), memory_high=12 * MIB)
    assert memory_left(tmp_path, tmp_path / "a") == 12 * MIB


@pytest.mark.parametrize(("outer", "middle"), [(30, 80), (80, 30)])
def test_the_least_limit_above_the_process_counts(tmp_path: Path, outer: int, middle: int) -> None:
    mount = tmp_path / "cg"
    write(mount, cgroup_procs="")
    v2(mount / "outer", outer * MIB, cpu=f"{outer * 10000} 100000")
    v2(mount / "outer/middle", middle * MIB, cpu=f"{middle * 10000} 100000")
    v2(mount / "outer/middle/own", "max", 5 * MIB)
    proc = process(tmp_path, "0::/outer/middle/own\n", UNIFIED.format(root="/", mount=mount))
    assert memory_left(proc, mount) == 30 * MIB
    assert cpu_quota(proc, mount) == 3.0


def test_each_group_is_charged_with_its_own_use(tmp_path: Path) -> None:
    mount = tmp_path / "cg"
    v2(mount / "pod", 100 * MIB, 90 * MIB)
    v2(mount / "pod/container", 50 * MIB, 10 * MIB)
    proc = process(tmp_path, "0::/pod/container\n", UNIFIED.format(root="/", mount=mount))
    assert memory_left(proc, mount) == 10 * MIB


def test_a_container_of_version_1_sees_its_group_as_the_root(tmp_path: Path) -> None:
    """Without a namespace, /proc names the host's path, and only that part is mounted."""
    memory, cpu = tmp_path / "cg/memory", tmp_path / "cg/cpu,cpuacct"
    v1(memory, 64 * MIB)
    v1_cpu(cpu, 150000)
    own = "/docker/0123abc"
    proc = process(
        tmp_path,
        f"9:memory:{own}\n4:cpu,cpuacct:{own}\n1:name=systemd:{own}\n",
        V1.format(root=own, mount=memory, controllers="memory")
        + V1.format(root=own, mount=cpu, controllers="cpu,cpuacct"),
    )
    assert memory_left(proc, tmp_path / "elsewhere") == 64 * MIB
    assert cpu_quota(proc, tmp_path / "elsewhere") == 1.5


def test_limits_above_what_a_container_of_version_1_sees_count(tmp_path: Path) -> None:
    stat = f"hierarchical_memory_limit {48 * MIB}\ntotal_inactive_file 0"
    v1(tmp_path / "memory", V1_UNLIMITED, 8 * MIB, stat)
    assert memory_left(tmp_path, tmp_path) == 40 * MIB


def test_a_nested_group_of_version_1_is_found_at_any_mount_point(tmp_path: Path) -> None:
    mount = tmp_path / "odd place" / "mem"
    v1(mount, V1_UNLIMITED)
    v1(mount / "slice", 32 * MIB)
    v1(mount / "slice/job", V1_UNLIMITED)
    point = str(mount).replace(" ", "\\040")
    proc = process(
        tmp_path,
        "4:memory:/slice/job\n0::/\n",
        V1.format(root="/", mount=point, controllers="memory"),
    )
    assert memory_left(proc, tmp_path / "elsewhere") == 32 * MIB


def test_both_versions_at_once_are_both_read(tmp_path: Path) -> None:
    """A hybrid machine keeps the memory in version 1 and the CPU in version 2, or the reverse."""
    mount = tmp_path / "cg"
    v1(mount / "memory/job", 16 * MIB)
    write(mount / "unified/job", cpu_max="50000 100000")
    proc = process(
        tmp_path,
        "4:memory:/job\n0::/job\n",
        V1.format(root="/", mount=mount / "memory", controllers="memory")
        + UNIFIED.format(root="/", mount=mount / "unified"),
    )
    assert memory_left(proc, mount) == 16 * MIB
    assert cpu_quota(proc, mount) == 0.5


@pytest.mark.parametrize("path", ["/", "/../../host.slice", "/gone"])
def test_in_a_namespace_the_mount_itself_is_the_group(tmp_path: Path, path: str) -> None:
    mount = v2(tmp_path / "cg", 24 * MIB, cpu="200000 100000")
    proc = process(tmp_path, f"0::{path}\n", UNIFIED.format(root="/", mount=mount))
    assert memory_left(proc, tmp_path / "elsewhere") == 24 * MIB
    assert cpu_quota(proc, tmp_path / "elsewhere") == 2.0


def test_without_a_list_of_mounts_the_usual_places_count(tmp_path: Path) -> None:
    mount = tmp_path / "cg"
    v1(mount / "memory/job", 16 * MIB)
    proc = process(tmp_path, "4:memory:/job\n", "")
    (proc / "mountinfo").unlink()
    assert memory_left(proc, mount) == 16 * MIB


@pytest.mark.parametrize("content", ["", "max", "-1", "1e9", "5 6 7", "\x00", "٣"])
def test_what_cannot_be_read_is_no_limit(tmp_path: Path, content: str) -> None:
    v2(tmp_path / "a", content, cpu=content)
    assert memory_left(tmp_path, tmp_path / "a") == NO_LIMIT
    assert cpu_quota(tmp_path, tmp_path / "a") == float("inf")


@pytest.mark.parametrize(
    ("quota", "num_cpus", "expected"),
    [(-1, 8, 8), (400000, 8, 4), (250000, 8, 2), (50000, 8, 1), (1600000, 8, 8), (0, 3, 3)],
)
def test_as_many_cores_are_usable_as_quota_and_affinity_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: int, num_cpus: int, expected: int
) -> None:
    v1_cpu(tmp_path / "cpu", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(num_cpus)))
    assert usable_cpus(tmp_path, tmp_path) == expected


def test_the_limits_of_this_process_can_be_read() -> None:
    assert 1 <= resource_limits.usable_cpus() <= len(os.sched_getaffinity(0))
    assert resource_limits.memory_left() > MIB
