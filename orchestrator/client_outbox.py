"""The way of a request's outputs to their client: bounded, and apart from the sessions.

The sessions put final tokens in and never wait. One task decodes them to text and writes chunks,
the outputs in turn; tokens that come while it writes go into a next chunk. A client that does not
read ends its request.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from amusd.protocol.errors import LimitExceededError
from orchestrator.completion_output import CompletionOutput, OutputChunk
from orchestrator.emission import Emission

WriteChunk = Callable[[OutputChunk], Awaitable[None]]
"""Writes a chunk."""
WriteEnd = Callable[[], Awaitable[None]]
"""Writes the end of an output."""

_MAX_WAITING_TOKENS = 1 << 16


class ClientOutbox:
    """Final tokens of all outputs of a request that wait to be written to its client."""

    def __init__(
        self, outputs: Sequence[CompletionOutput], write: WriteChunk, timeout_seconds: float
    ) -> None:
        """Write chunks of ``outputs`` with ``write``, each within ``timeout_seconds``."""
        self._outputs = outputs
        self._write = write
        self._timeout_seconds = timeout_seconds
        self._turn = 0
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
        """Write the next chunk or end of the outputs in turn; return whether there was any."""
        for _ in self._outputs:
            output = self._outputs[self._turn]
            self._turn = (self._turn + 1) % len(self._outputs)
            chunk = output.take()
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
