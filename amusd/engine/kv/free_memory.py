"""The free memory of a device, for the default size of the KV cache."""

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 62


def free_bytes(device: str) -> int:
    """Return the free memory of a device. On CPU the limit of a container counts."""
    if device.startswith("cuda"):
        # Importing torch takes seconds, so only engines that need it do so.
        import torch  # noqa: PLC0415

        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return min(_available_bytes(), _free_in_cgroup())


def _available_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return int(found.split()[1]) << 10


def _free_in_cgroup() -> int:
    """Return the free bytes in the cgroup of a container; without a limit, a huge number.

    The cgroup counts idle pages of files as used, but the system frees them on demand. Loading a
    model leaves many of them.
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
