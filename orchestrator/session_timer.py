"""The timer of a session: one deadline that each event moves."""

import asyncio
from collections.abc import Callable


class Timer:
    """Calls back when nothing was expected anew for long enough. It seldom touches the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_timeout: Callable[[], None]) -> None:
        """Call ``on_timeout`` on ``loop``; the first deadline comes with ``expect_within``."""
        self._loop = loop
        self._on_timeout = on_timeout
        self._deadline = 0.0
        self._handle: asyncio.TimerHandle | None = None

    def expect_within(self, seconds: float) -> None:
        """Call back in ``seconds`` unless this is called again before."""
        self._deadline = self._loop.time() + seconds
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
        self._handle = None
        if self._loop.time() < self._deadline:
            self._handle = self._loop.call_at(self._deadline, self._fire)
        else:
            self._on_timeout()
