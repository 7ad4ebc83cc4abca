"""Time slices of threads, as the kernel reports them."""

import os
import platform
import threading
from pathlib import Path

import pytest

from amusd.rpc.time_slices import restore_time_slice, shorten_time_slices


def slice_nanoseconds() -> int:
    """Return the slice of the calling thread."""
    lines = Path(f"/proc/self/task/{threading.get_native_id()}/sched").read_text().splitlines()
    found = next(line for line in lines if line.startswith("se.slice"))
    return int(found.split(":")[1])


@pytest.mark.skipif(
    not Path("/proc/self/sched").exists() or "se.slice" not in Path("/proc/self/sched").read_text(),
    reason="this kernel does not report time slices",
)
def test_threads_inherit_a_short_slice_and_can_have_the_usual_one_again() -> None:
    found: list[int] = []
    restore_time_slice()  # a service that ran in this process before has shortened it
    usual = slice_nanoseconds()
    assert usual > 100_000

    def engine() -> None:
        found.append(slice_nanoseconds())
        assert restore_time_slice()
        found.append(slice_nanoseconds())

    def service() -> None:
        assert shorten_time_slices()
        found.append(slice_nanoseconds())
        thread = threading.Thread(target=engine)
        thread.start()
        thread.join()
        found.append(slice_nanoseconds())

    thread = threading.Thread(target=service)
    thread.start()
    thread.join()
    assert found == [100_000, 100_000, usual, 100_000]


def test_where_there_is_no_such_call_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "unknown")
    assert not shorten_time_slices()
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    monkeypatch.undo()
    shorten_time_slices()
    assert os.getpriority(os.PRIO_PROCESS, 0) == nice
    restore_time_slice()
