"""The way of a request's outputs to their client: bounded, and apart from the sessions.

The sessions put final tokens in and never wait. One task decodes them to text and writes chunks,
the outputs in turn; tokens that come while it writes go into a next chunk. A client that does not
read ends its request.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from amusd.analysis.timeline import TimelineEvent
from amusd.protocol.errors import LimitExceededError
from orchestrator.completion_output import CompletionOutput, OutputChunk
from orchestrator.emission import Emission

WriteChunk = Callable[[OutputChunk], Awaitable[None]]
"""Writes a chunk."""
WriteEvent = Callable[[TimelineEvent], Awaitable[None]]
"""Writes an event of the timeline."""
WriteEnd = Callable[[], Awaitable[None]]
"""Writes the end of an output."""

_MAX_WAITING_TOKENS = 1 << 16
_MAX_WAITING_EVENTS = 1 << 14


class ClientOutbox:
    """Final tokens of all outputs of a request that wait to be written to its client."""

    def __init__(
        self,
        outputs: Sequence[CompletionOutput],
        write: WriteChunk,
        timeout_seconds: float,
        write_event: WriteEvent | None = None,
    ) -> None:
        """Write chunks of ``outputs`` with ``write``, each within ``timeout_seconds``.

        Events are written with ``write_event``.
        """
        self._outputs = outputs
        self._write = write
        self._timeout_seconds = timeout_seconds
        self._turn = 0
        self._write_event = write_event
        self._events: deque[TimelineEvent] = deque()
        self._ends: dict[int, tuple[WriteEnd, asyncio.Event]] = {}
        self._is_closed = False
        self._filled = asyncio.Event()

    def put(self, output: CompletionOutput, emission: Emission) -> None:
        """Add final tokens of an output.

        Raises:
            LimitExceededError: too many tokens wait already.
        """
        num_waiting = sum(one.num_waiting for one in self._outputs)
        if num_waiting + len(emission.tokens) > _MAX_WAITING_TOKENS:
            raise LimitExceededError(
                f"more than {_MAX_WAITING_TOKENS} tokens wait for the client to read: read faster"
            )
        output.put(emission)
        self._filled.set()

    def put_event(self, event: TimelineEvent) -> None:
        """Add an event.

        Raises:
            LimitExceededError: too many events wait already.
        """
        if len(self._events) >= _MAX_WAITING_EVENTS:
            raise LimitExceededError(
                f"more than {_MAX_WAITING_EVENTS} events wait for the client to read: read faster"
            )
        self._events.append(event)
        self._filled.set()

    async def end(self, output: CompletionOutput, write_end: WriteEnd) -> None:
        """Write all tokens of an output, then its end; return when that is done.

        It needs a running ``drain``, which bounds the wait.
        """
        output.close()
        is_written = asyncio.Event()
        self._ends[output.index] = (write_end, is_written)
        self._filled.set()
        await is_written.wait()

    def close(self) -> None:
        """Take no more tokens; ``drain`` returns when all are written."""
        for output in self._outputs:
            output.close()
        self._is_closed = True
        self._filled.set()

    async def drain(self) -> None:
        """Write chunks as tokens come, until closed.

        Raises:
            LimitExceededError: the client did not read a message in time.
        """
        while True:
            await self._filled.wait()
            self._filled.clear()
            while await self._write_one():
                pass
            if self._is_closed:
                return

    async def _write_one(self) -> bool:
        """Write an event, or the next chunk or end of the outputs; return if there was any."""
        if self._events and self._write_event is not None:
            await self._in_time(self._write_event(self._events.popleft()))
            return True
        for _ in self._outputs:
            output = self._outputs[self._turn]
            chunk = output.take()
            if chunk is None or chunk.tokens:  # all of the prompt comes before other outputs
                self._turn = (self._turn + 1) % len(self._outputs)
            if chunk is not None:
                await self._in_time(self._write(chunk))
                return True
            if output.index in self._ends:
                write_end, is_written = self._ends.pop(output.index)
                await self._in_time(write_end())
                is_written.set()
                return True
        return False

    async def _in_time(self, written: Awaitable[None]) -> None:
        """Wait until a message is written.

        Raises:
            LimitExceededError: the client did not read it in time.
        """
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await written
        except TimeoutError:
            raise LimitExceededError(
                f"the client has not read for {self._timeout_seconds:g} s: read faster, or raise "
                "--client-write-timeout"
            ) from None
