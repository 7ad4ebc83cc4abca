"""How often the threads of processes woke up, as Linux counts it.

A voluntary context switch is a thread that went to sleep; each is followed by one wake-up.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True, order=True)
class ThreadOf:
    """A thread of a service, with the name that the kernel knows it by."""

    role: str
    thread_id: int
    name: str


def count_wakeups(pids: Mapping[str, int], proc: Path = _PROC) -> Counter[ThreadOf]:
    """Return the wake-ups so far of each thread of the processes, given by role."""
    counts: Counter[ThreadOf] = Counter()
    for role, pid in pids.items():
        for task in (proc / str(pid) / "task").iterdir():
            try:
                lines = (task / "status").read_text(encoding="utf-8").splitlines()
            except (FileNotFoundError, ProcessLookupError):
                continue  # the thread has just ended
            fields = dict(line.split(":", 1) for line in lines if ":" in line)
            thread = ThreadOf(role, int(task.name), fields["Name"].strip())
            counts[thread] = int(fields["voluntary_ctxt_switches"])
    return counts
