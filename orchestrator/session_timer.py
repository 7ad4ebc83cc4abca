"""The timer of a session: one deadline that each event moves.

After a stall of the event loop, what has arrived meanwhile is not read yet. So a timer that fires
late waits a little longer, once.
"""

import asyncio
from collections.abc import Callable

_STALL_SECONDS = 0.5


class Timer:
    """Calls back when nothing was expected anew for long enough. It seldom touches the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_timeout: Callable[[], None]) -> None:
        """Call ``on_timeout`` on ``loop``; the first deadline comes with ``expect_within``."""
        self._loop = loop
        self._on_timeout = on_timeout
        self._deadline = 0.0
        self._has_waited_longer = False
        self._handle: asyncio.TimerHandle | None = None

    def expect_within(self, seconds: float) -> None:
        """Call back in ``seconds`` unless this is called again before."""
        self._deadline = self._loop.time() + seconds
        self._has_waited_longer = False
        if self._handle is not None:
            if self._handle.when() <= self._deadline:
                return  # it looks at the deadline when it fires
            self._handle.cancel()
        self._handle = self._loop.call_at(self._deadline, self._fire)

    def cancel(self) -> None:
        """Call back no more."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _fire(self) -> None:
        handle, self._handle = self._handle, None
        now = self._loop.time()
        if now < self._deadline:
            self._handle = self._loop.call_at(self._deadline, self._fire)
            return
        is_late = handle is not None and now - handle.when() > _STALL_SECONDS
        if is_late and not self._has_waited_longer:
            self._has_waited_longer = True
            self._handle = self._loop.call_at(now + _STALL_SECONDS, self._fire)
        else:
            self._on_timeout()
