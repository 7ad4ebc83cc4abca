"""The machine and the versions that a report was measured on."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import amusd
from amusd.resource_limits import usable_cpus

_CPUINFO = Path("/proc/cpuinfo")


def provenance() -> dict[str, Any]:
    """Return the head of every report: version, date and machine."""
    return {
        "amusd": amusd.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": processor(),
            "cpus": os.cpu_count(),
            "usable_cpus": usable_cpus(),
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
    }


def processor(cpuinfo: Path = _CPUINFO) -> str:
    """Return the model of the processor; on Linux, ``platform`` knows only its family."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
