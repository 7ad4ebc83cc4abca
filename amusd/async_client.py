"""The Python client for programs with an event loop: as ``amusd.client``, with ``async for``."""

import asyncio
import weakref
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, Unpack

import grpc
import grpc.aio

from amusd.clients.chat_messages import Conversation
from amusd.clients.connection import Connection
from amusd.clients.outputs import Output, Piece
from amusd.clients.request_building import AnyPrompt, chat_request, generate_request
from amusd.clients.request_options import NO_OPTIONS, OptionFields, Options
from amusd.protocol.errors import PreconditionError, UnavailableError
from amusd.v1 import orchestrator_pb2, orchestrator_pb2_grpc

__all__ = ["AsyncClient", "AsyncGeneration"]

_CLOSED = "the client is closed: make a new one"
_INFO_SECONDS = 10.0


class AsyncResponseStream(Protocol):
    """A running call of grpc.aio."""

    def __aiter__(self) -> AsyncIterator[orchestrator_pb2.GenerateResponse]:
        """Iterate over the responses as they come."""

    def cancel(self) -> bool:
        """End the call; without effect on a call that has ended."""


class AsyncGeneration(Output):
    """Output that is being generated. Iterate over it with ``async for`` to read its pieces.

    It runs from its creation. It ends early when a loop over it is left, at the end of an
    ``async with`` block, with ``close``, or when nothing refers to it any more.
    """

    def __init__(
        self, responses: AsyncResponseStream, connection: Connection, num_completions: int = 1
    ) -> None:
        """Read a call that runs already on the running event loop."""
        super().__init__(num_completions)
        self._responses = responses
        self._connection = connection
        self._is_closed = False
        # grpc.aio itself never ends a call that was forgotten.
        weakref.finalize(self, _end_forgotten, responses, asyncio.get_running_loop()).atexit = False

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Yield pieces as tokens become final. Leaving the loop ends the generation.

        Raises:
            AmusdError: the server refuses the request, or cannot be reached.
        """
        if self._is_closed:
            return
        try:
            async for response in self._responses:
                piece = self.take(response)
                if piece is not None:
                    yield piece
        except grpc.RpcError as error:
            if not self._is_closed:
                raise self._connection.error_of(error) from error
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            if not self._is_closed:  # the call was ended, not the task that reads it
                raise UnavailableError(f"the call was ended: {_CLOSED}") from None
        finally:
            self.close()

    async def __aenter__(self) -> Self:
        """Return self."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the generation if it still runs."""
        self.close()

    def close(self) -> None:
        """End the generation if it still runs, in all services; what was read stays."""
        self._is_closed = True
        self._responses.cancel()

    async def wait(self) -> Self:
        """Read the output to its end and return self.

        Raises:
            AmusdError: as for iteration.
        """
        async for _ in self:
            pass
        return self


class AsyncClient:
    """A connection to an orchestrator, for the event loop that makes its first call."""

    def __init__(
        self,
        address: str = "localhost:50050",
        timeout_seconds: float | None = None,
        use_proxy: bool = False,
        *,
        tls: bool = False,
        ca: str | Path | bytes | None = None,
        api_key: str = "",
        max_attempts: int = 3,
    ) -> None:
        """Connect to ``host:port``; the arguments and errors are those of ``Client``."""
        self._connection = Connection(address, use_proxy, tls, ca, api_key, max_attempts)
        self._timeout_seconds = timeout_seconds
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None  # of the channel
        self._is_closed = False

    async def __aenter__(self) -> Self:
        """Return self."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connection."""
        await self.close()

    async def close(self) -> None:
        """Close the connection, which ends running generations."""
        self._is_closed = True
        if self._channel is not None:
            await self._channel.close(None)

    def generate(
        self, prompt: AnyPrompt, options: Options = NO_OPTIONS, **changes: Unpack[OptionFields]
    ) -> AsyncGeneration:
        """Start to continue a prompt, as ``Client.generate`` does.

        Raises:
            InvalidInputError: prompt or options are of no use; the error names what is wrong.
            PreconditionError: the client is closed.
        """
        options = replace(options, **changes)
        return self._start(generate_request(prompt, options), options)

    def chat(
        self,
        conversation: Conversation,
        options: Options = NO_OPTIONS,
        **changes: Unpack[OptionFields],
    ) -> AsyncGeneration:
        """Start to answer a conversation, as ``Client.chat`` does."""
        options = replace(options, **changes)
        return self._start(chat_request(conversation, options), options)

    async def server_info(self) -> orchestrator_pb2.GetServerInfoResponse:
        """Return the server's models, limits and strategies.

        Raises:
            AmusdError: the server cannot be reached, or is not ready; or the client is closed.
        """
        try:
            found: orchestrator_pb2.GetServerInfoResponse = await self._opened().GetServerInfo(
                orchestrator_pb2.GetServerInfoRequest(),
                timeout=self._timeout_seconds or _INFO_SECONDS,
                metadata=self._connection.metadata,
            )
            return found
        except grpc.RpcError as error:
            raise self._connection.error_of(error) from error

    def _start(
        self, request: orchestrator_pb2.GenerateRequest, options: Options
    ) -> AsyncGeneration:
        responses = self._opened().Generate(
            request, timeout=self._timeout_seconds, metadata=self._connection.metadata
        )
        return AsyncGeneration(responses, self._connection, options.n)

    def _opened(self) -> Any:
        """Return the stub of a channel that belongs to the running event loop."""
        if self._is_closed:
            raise PreconditionError(_CLOSED)
        if self._channel is None:
            self._channel = self._connection.open_async()
            self._stub = orchestrator_pb2_grpc.OrchestratorServiceStub(self._channel)
        return self._stub


def _is_cancelled() -> bool:
    """Whether the running task was asked to end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _end_forgotten(responses: AsyncResponseStream, loop: asyncio.AbstractEventLoop) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(responses.cancel)
