"""Time slices of threads: those that handle messages run at once, even beside a busy engine.

Linux gives a thread that wakes up the processor only when the slice of the running thread ends, 3
ms by default. On a machine with few cores an engine thread would hold each message up for that
long. A thread with a shorter slice may preempt (Linux 6.12 and newer; older kernels ignore it).
Nothing here needs a privilege, and every failure leaves the defaults.
"""

import ctypes
import os
import platform

_SYSCALL_NUMBERS = {"x86_64": 314, "aarch64": 274}  # of sched_setattr, which libc does not wrap
_SHORT_NANOSECONDS = 100_000  # the least that the kernel takes


class _Attributes(ctypes.Structure):
    """``struct sched_attr`` of the kernel."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


def shorten_time_slices() -> bool:
    """Give the calling thread, and those it starts later, the shortest slice.

    Returns whether the kernel took it.
    """
    return _set_slice(_SHORT_NANOSECONDS)


def restore_time_slice() -> bool:
    """Give the calling thread, and those it starts later, the usual slice again."""
    return _set_slice(0)


def _set_slice(nanoseconds: int) -> bool:
    number = _SYSCALL_NUMBERS.get(platform.machine())
    if platform.system() != "Linux" or number is None:
        return False
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False  # somebody chose another policy for this process
    attributes = _Attributes(
        size=ctypes.sizeof(_Attributes),
        policy=os.SCHED_OTHER,
        nice=os.getpriority(os.PRIO_PROCESS, 0),
        runtime=nanoseconds,
    )
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.syscall(number, 0, ctypes.byref(attributes), 0) == 0)
