"""The way from an engine thread to a gRPC stream: a bounded queue that ends with an error.

Made by the servicer of a stream, filled from the engine thread, emptied by the one task that
writes the stream. It is bounded: a peer that does not read loses its session, not our memory.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from amusd.protocol.errors import AmusdError, LimitExceededError

Item = TypeVar("Item")


class Outbox(Generic[Item]):
    """Messages of one session that wait to be written."""

    def __init__(self, max_items: int) -> None:
        """Make an empty outbox on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Item | AmusdError] = asyncio.Queue(max_items + 1)
        self._max_items = max_items

    def put(self, item: Item | AmusdError) -> None:
        """Hand over from any thread; an error ends the stream after what stands before it."""
        # After the loop has ended nobody is left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._put, item)

    async def drain(self, write: Callable[[Item], Awaitable[None]]) -> None:
        """Write items as they come, until an error comes, which is raised."""
        while True:
            item = await self._items.get()
            if isinstance(item, AmusdError):
                raise item
            await write(item)

    def _put(self, item: Item | AmusdError) -> None:
        if self._items.qsize() < self._max_items:
            self._items.put_nowait(item)
        elif not self._items.full():
            self._items.put_nowait(
                LimitExceededError(f"{self._max_items} messages wait to be read: read faster")
            )


async def until_first_ends(*parts: Awaitable[None]) -> None:
    """Run coroutines side by side until one ends, then cancel the others; raise what it raised."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
