"""The way of an output to its client: bounded, and apart from the session that writes it.

The session puts final tokens in and never waits. One task decodes them to text and writes chunks;
tokens that come while it writes go into the next chunk. A client that does not read ends its
generation.
"""

import asyncio
from collections.abc import Awaitable, Callable

from amusd.protocol.errors import LimitExceededError
from orchestrator.detokenizer import TextDecoder

WriteChunk = Callable[[tuple[int, ...], str], Awaitable[None]]
"""Writes tokens and their text."""

_MAX_WAITING_TOKENS = 1 << 16
_MAX_CHUNK_TOKENS = 1 << 10  # decoded at once; others have their turn between two chunks


class ClientOutbox:
    """Final tokens that wait to be written to one client."""

    def __init__(self, decoder: TextDecoder, write: WriteChunk, timeout_seconds: float) -> None:
        """Write chunks with ``write``, each within ``timeout_seconds``."""
        self._decoder = decoder
        self._write = write
        self._timeout_seconds = timeout_seconds
        self._tokens: list[int] = []
        self._is_closed = False
        self._filled = asyncio.Event()

    def put(self, tokens: tuple[int, ...]) -> None:
        """Add final tokens.

        Raises:
            LimitExceededError: too many tokens wait already.
        """
        if len(self._tokens) + len(tokens) > _MAX_WAITING_TOKENS:
            raise LimitExceededError(
                f"more than {_MAX_WAITING_TOKENS} tokens wait for the client to read: read faster"
            )
        self._tokens.extend(tokens)
        self._filled.set()

    def close(self) -> None:
        """Take no more tokens; ``drain`` returns when all are written."""
        self._is_closed = True
        self._filled.set()

    async def drain(self) -> None:
        """Write chunks as tokens come, until closed.

        Raises:
            LimitExceededError: the client did not read a chunk in time.
        """
        while True:
            await self._filled.wait()
            self._filled.clear()
            while self._tokens:
                tokens = tuple(self._tokens[:_MAX_CHUNK_TOKENS])
                del self._tokens[:_MAX_CHUNK_TOKENS]
                await self.in_time(self._write(tokens, self._decoder.feed(tokens)))
            if self._is_closed:
                return

    async def in_time(self, written: Awaitable[None]) -> None:
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
