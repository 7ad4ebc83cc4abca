"""What the machine lets this process use: CPU cores, and the memory of its control groups.

A process is in a control group of each hierarchy, and all groups above it limit it, too: the least
limit counts. Version 1 has one hierarchy for each controller, version 2 has one for all, and a
machine may mount both. A container may see only the part of a hierarchy that begins with its own
group. Nothing here is cached, because limits may change while a process runs.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

NO_LIMIT = 1 << 62
"""Bytes of memory where no control group sets a limit."""

Found = TypeVar("Found", bound=float)

_PROC = Path("/proc/self")
_USUAL_MOUNT = Path("/sys/fs/cgroup")
_V2 = ""  # controllers of the line for version 2 in /proc/self/cgroup


def usable_cpus(proc: Path = _PROC, mount: Path = _USUAL_MOUNT) -> int:
    """Return how many cores the calling thread can keep busy, 1 or more.

    Its affinity counts, which includes the cpuset of its control group, and the CPU quota, rounded
    down: threads beyond the quota only wait for one another.
    """
    num_cpus = len(os.sched_getaffinity(0))
    return max(1, int(min(num_cpus, cpu_quota(proc, mount))))


def cpu_quota(proc: Path = _PROC, mount: Path = _USUAL_MOUNT) -> float:
    """Return the CPU quota of the control groups, in cores; infinity without one."""
    return min(_levels("cpu", _cpu_quota, proc, mount), default=float("inf"))


def memory_left(proc: Path = _PROC, mount: Path = _USUAL_MOUNT) -> int:
    """Return the bytes that the control groups leave; ``NO_LIMIT`` without a limit.

    A group counts idle pages of files as used, but the system frees them on demand. Loading a
    model leaves many of them.
    """
    return min(_levels("memory", _memory_left, proc, mount), default=NO_LIMIT)


def _levels(
    controller: str, read: Callable[[Path], Found | None], proc: Path, mount: Path
) -> Iterator[Found]:
    """Return what ``read`` finds in the groups of the process and in all groups above them."""
    folders: set[Path] = set()
    for group in _groups(controller, proc, mount):
        folders.update((group, *group.parents))
    return (found for folder in folders if (found := read(folder)) is not None)


def _groups(controller: str, proc: Path, mount: Path) -> Iterator[Path]:
    """Return the folders of the process's own groups that may limit what ``controller`` does.

    ``mount`` and its folder of the controller are always among them, because they are groups of
    the process or above one, wherever ``proc`` cannot be read.
    """
    yield mount
    yield mount / controller
    paths = dict(_own_paths(controller, proc))
    for controllers, root, point in _mounts(proc):
        path = next((paths[name] for name in controllers if name in paths), None)
        if path is not None:
            yield _folder(point, root, path)
    for name, path in paths.items():
        yield _folder(mount / name, "/", path)


def _own_paths(controller: str, proc: Path) -> Iterator[tuple[str, str]]:
    """Return the paths of the process's groups in version 2 and in ``controller`` of version 1."""
    for line in _lines(proc / "cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        names = controllers.split(",")
        if not controllers:
            yield _V2, path
        elif controller in names:
            yield controller, path


def _mounts(proc: Path) -> Iterator[tuple[list[str], str, Path]]:
    """Return the controllers, the mounted part and the folder of each mount of a hierarchy."""
    for line in _lines(proc / "mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        root, point = _unescaped(fields[3]), Path(_unescaped(fields[4]))
        if kind[0] == "cgroup2":
            yield [_V2], root, point
        elif kind[0] == "cgroup":
            yield kind[2].split(","), root, point


def _folder(point: Path, root: str, path: str) -> Path:
    """Return the folder of the group ``path`` where ``root`` of its hierarchy is mounted."""
    if path == root or path.startswith(root.rstrip("/") + "/"):
        path = path[len(root.rstrip("/")) :]
    folder = point / path.lstrip("/")
    is_inside = ".." not in Path(path).parts  # a namespace names groups outside with ..
    return folder if is_inside and folder.is_dir() else point


def _cpu_quota(folder: Path) -> float | None:
    """Return the CPU quota of one group, in cores."""
    words = _text(folder / "cpu.max").split()
    quota, period = (
        words
        if len(words) == 2
        else (
            _text(folder / "cpu.cfs_quota_us"),
            _text(folder / "cpu.cfs_period_us"),
        )
    )
    quota_us, period_us = _number(quota), _number(period)
    return quota_us / period_us if quota_us and period_us else None


def _memory_left(folder: Path) -> int | None:
    """Return the bytes that one group leaves."""
    words = (line.split() for line in _lines(folder / "memory.stat"))
    stat = {pair[0]: _number(pair[1]) for pair in words if len(pair) == 2}
    limits = (
        _number(_text(folder / "memory.max")),
        _number(_text(folder / "memory.high")),
        _number(_text(folder / "memory.limit_in_bytes")),
        stat.get("hierarchical_memory_limit"),
    )
    known = [limit for limit in limits if limit is not None]
    if not known:
        return None
    used = _number(_text(folder / "memory.current"))
    if used is None:
        used = _number(_text(folder / "memory.usage_in_bytes")) or 0
    idle = stat.get("total_inactive_file", stat.get("inactive_file")) or 0
    return max(0, min(known) - max(0, used - idle))


def _number(text: str) -> int | None:
    """Return a number of 0 or more; None for ``max``, -1 and anything else."""
    return int(text) if text.isascii() and text.isdigit() else None


def _unescaped(path: str) -> str:
    """Return a path of mountinfo, where some characters are octal escapes."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, character)
    return path


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _lines(file: Path) -> list[str]:
    return _text(file).splitlines()
