"""The free memory of a device, for the default size of the KV cache."""

import os
from pathlib import Path

from amusd.resource_limits import memory_left

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: str) -> int:
    """Return the free memory of a device. On CPU the limits of control groups count."""
    if device.startswith("cuda"):
        # Importing torch takes seconds, so only engines that need it do so.
        import torch  # noqa: PLC0415

        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return min(_available_bytes(), memory_left(mount=_CGROUP))


def _available_bytes() -> int:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return int(found.split()[1]) << 10
