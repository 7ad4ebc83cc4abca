"""The way from an engine thread to gRPC streams: bounded queues that end with an error.

The servicer of a stream makes its outbox, the engine thread fills it, and the one task that writes
the stream empties it. An outbox is bounded: a peer that does not read loses its session. The
engine thread's postbox collects what all outboxes get, so that each batch wakes the event loop
once.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from amusd.protocol.errors import AmusdError, LimitExceededError

Item = TypeVar("Item")

_LAST_WRITE_SECONDS = 1.0


class Postbox:
    """Messages of the engine thread on their way to the event loop."""

    def __init__(self) -> None:
        """Start empty; ``attach`` it to the event loop before use."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._posts: list[tuple[Outbox[Any], Any]] = []

    def attach(self) -> None:
        """Deliver to the running event loop from now on."""
        self._loop = asyncio.get_running_loop()

    def put(self, outbox: "Outbox[Item]", item: Item | AmusdError) -> None:
        """Collect a message; on the engine thread only."""
        self._posts.append((outbox, item))

    def flush(self) -> None:
        """Hand all messages over, with one wake-up of the event loop; on the engine thread only."""
        if not self._posts or self._loop is None:
            return
        posts, self._posts = self._posts, []
        # After the loop has ended nobody is left to receive.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(_deliver, posts)


def _deliver(posts: "list[tuple[Outbox[Any], Any]]") -> None:
    for outbox, item in posts:
        outbox.put(item)


class Outbox(Generic[Item]):
    """Messages of one stream that wait to be written. It belongs to the event loop."""

    def __init__(self, max_items: int) -> None:
        """Hold at most ``max_items``; one more ends the stream with an error."""
        self._items: deque[Item | AmusdError] = deque()
        self._max_items = max_items
        self._is_closed = False
        self._overflow: LimitExceededError | None = None
        self._filled: asyncio.Future[None] | None = None
        self._writing: asyncio.Task[Any] | None = None  # runs ``drain``, and writes a message

    def put(self, item: Item | AmusdError) -> None:
        """Add a message; an error ends the stream after the messages before it."""
        if self._is_closed:
            return
        if len(self._items) == self._max_items:
            self._end_for_overflow()
            return
        self._items.append(item)
        self._wake()

    def close(self) -> None:
        """Take no more messages; ``drain`` returns when all are written."""
        self._is_closed = True
        self._wake()

    async def drain(self, write: Callable[[Item], Awaitable[None]]) -> None:
        """Write messages as they come until the outbox is closed, or raise the error that comes.

        Raises:
            LimitExceededError: the peer does not read, and too many messages wait for it.
        """
        while True:
            while self._items:
                item = self._items.popleft()
                if isinstance(item, AmusdError):
                    raise item
                await self._write(write, item)
            if self._overflow is not None:
                raise self._overflow
            if self._is_closed:
                return
            self._filled = asyncio.get_running_loop().create_future()
            await self._filled

    async def _write(self, write: Callable[[Item], Awaitable[None]], item: Item) -> None:
        """Write a message; an overflow interrupts it, because it may never end."""
        task = asyncio.current_task()
        self._writing = task
        try:
            # After an overflow the rest is written as long as the peer reads it.
            async with asyncio.timeout(None if self._overflow is None else _LAST_WRITE_SECONDS):
                await write(item)
        except TimeoutError:
            if self._overflow is None:
                raise
            raise self._overflow from None
        except asyncio.CancelledError:
            if self._overflow is None or task is None:
                raise
            task.uncancel()
            raise self._overflow from None
        finally:
            self._writing = None

    def _end_for_overflow(self) -> None:
        self._is_closed = True
        self._overflow = LimitExceededError(
            f"{self._max_items} messages wait to be read: read faster"
        )
        if self._writing is not None:
            self._writing.cancel()
        self._wake()

    def _wake(self) -> None:
        if self._filled is not None and not self._filled.done():
            self._filled.set_result(None)


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
