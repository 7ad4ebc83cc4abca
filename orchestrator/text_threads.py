"""Threads that turn prompts into tokens, so that the event loop serves all others meanwhile.

Owners and bounds: the servicer makes the threads and ends them. Short texts have threads of their
own, so they never wait for long ones. A call that is cancelled leaves the queue at once; work that
has begun runs to its end, and its thread counts as busy until then. The queue holds no more calls
than the orchestrator admits.
"""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

_LONG_BYTES = 1 << 16  # takes some 50 ms
_NUM_THREADS = 2  # of each kind

Result = TypeVar("Result")


class TextThreads:
    """Runs the work on texts, short and long ones apart."""

    def __init__(self) -> None:
        """Start without threads; they come with the first work."""
        self._short = _Lane("text")
        self._long = _Lane("long-text")

    async def run(self, num_bytes: int, work: Callable[[], Result]) -> Result:
        """Return the result of ``work`` on a text of ``num_bytes``, or raise what it raises."""
        return await (self._long if num_bytes > _LONG_BYTES else self._short).run(work)

    def close(self) -> None:
        """Take no more work, and end the threads after what they are doing."""
        self._short.close()
        self._long.close()


class _Lane:
    """A few threads and the queue of those that wait for one."""

    def __init__(self, name: str) -> None:
        self._free = asyncio.Semaphore(_NUM_THREADS)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, name)

    async def run(self, work: Callable[[], Result]) -> Result:
        await self._free.acquire()
        try:
            future = self._threads.submit(work)
        except BaseException:
            self._free.release()
            raise
        loop = asyncio.get_running_loop()

        def release(_: "Future[Any]") -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._free.release)

        future.add_done_callback(release)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
