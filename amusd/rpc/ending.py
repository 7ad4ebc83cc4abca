"""How a service is asked to end: by a signal, by its standard input, or by itself."""

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Iterator


class Ending:
    """Whether a service is to end, and whether it may wait for what is open.

    Belongs to one event loop.
    """

    def __init__(self) -> None:
        """Start without a reason to end."""
        self._end = asyncio.Event()
        self._at_once = asyncio.Event()
        self._signals = 0

    @property
    def is_requested(self) -> bool:
        """Whether the service is to end."""
        return self._end.is_set()

    @property
    def is_at_once(self) -> bool:
        """Whether it is to end without waiting for what is open."""
        return self._at_once.is_set()

    def request(self) -> None:
        """Ask the service to end."""
        self._end.set()

    def request_at_once(self) -> None:
        """Ask the service to wait for nothing when it ends."""
        self._at_once.set()

    async def wait(self) -> None:
        """Return when the service is to end."""
        await self._end.wait()

    async def wait_at_once(self) -> None:
        """Return when the service is to end without waiting."""
        await self._at_once.wait()

    @contextlib.contextmanager
    def signals_handled(self, end_with_stdin: bool = False) -> Iterator[None]:
        """Let SIGINT and SIGTERM ask for the end; a second one cuts the grace short."""
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.getsignal(number) for number in numbers}
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal)
        if end_with_stdin:
            watcher = threading.Thread(target=self._watch_stdin, args=(loop,), daemon=True)
            watcher.start()
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)
                signal.signal(number, before[number])

    def _on_signal(self) -> None:
        self._signals += 1
        self._end.set()
        if self._signals > 1:
            self._at_once.set()

    def _watch_stdin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Ask for the end when the parent process closes standard input, or dies."""
        # Not through sys.stdin: its lock, held here, would break the interpreter's shutdown.
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._end.set)
