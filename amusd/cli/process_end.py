"""How the process of a command ends: at a signal while it starts, and at its own end.

A normal end of the interpreter kills daemon threads wherever they are. Inside gRPC or torch this
aborts the process ("terminate called without an active exception"). So the process ends at once
after its output is flushed, and for commands after its exit handlers have run.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

_EXIT_HANDLER_SECONDS = 2.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def end_at_signals() -> None:
    """Until other handlers take over, end with exit code 0 and one line at SIGINT and SIGTERM.

    For services: nothing is open yet while they import their libraries.
    """
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end_at_once)


def leave(code: int, runs_exit_handlers: bool) -> NoReturn:
    """End the process with ``code``, without waiting for threads that still run.

    A service closes all that it owns before, and torch's exit handlers are in the way of a model
    that still loads, so it needs none.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if runs_exit_handlers:
        handlers = threading.Thread(target=atexit._run_exitfuncs, daemon=True)
        handlers.start()
        handlers.join(_EXIT_HANDLER_SECONDS)
    for stream in (sys.stdout, sys.stderr):
        # Its reader may be gone.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    # Not through sys.stderr: the signal may have interrupted a write to it.
    with contextlib.suppress(OSError):
        os.write(2, f"ending at {signal.Signals(number).name}, before serving\n".encode())
    os._exit(0)
