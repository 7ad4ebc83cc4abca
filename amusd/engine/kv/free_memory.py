"""How much memory a device has left, for the default size of the cache."""

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 62


def free_bytes(device: str) -> int:
    """Return the free memory of a device; on CPU what the container's limit leaves."""
    if device.startswith("cuda"):
        # Torch takes seconds to import: only engines that need it wait for it.
        import torch  # noqa: PLC0415

        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return min(_available(), _left_in_cgroup())


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return int(found.split()[1]) << 10


def _left_in_cgroup() -> int:
    """Return what the cgroup of a container leaves; without a limit, more than there is.

    Pages of files that nobody used for a while count as used there, but are free to take: a model
    that was just read leaves many.
    """
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        stat = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return _NO_LIMIT
    if limit == "max":
        return _NO_LIMIT
    idle = next((int(line.split()[1]) for line in stat if line.startswith("inactive_file ")), 0)
    return max(0, int(limit) - max(0, used - idle))
