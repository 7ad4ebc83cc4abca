"""Graceful shutdown: new sessions are refused, and open sessions may finish.

A *session* is a call of Generate, Propose or Verify. While a service drains, only new sessions are
refused. The rollbacks of open sessions, and health checks, are answered until the end. So the
server itself is stopped last, because a stopped gRPC server accepts no calls at all.
"""

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from amusd.rpc.faults import status_details

Call = Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Awaitable[Any]]

_ABORT_SECONDS = 2.0


class Drain(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # only its stub is generic
    """Tracks the open streams of one server, and refuses new sessions while it drains.

    Lives on the server's event loop. Each call adds and removes its own stream.
    """

    def __init__(self, service: str, session_rpc: str) -> None:
        """Track the streams of a server.

        Calls of ``session_rpc``, a stream of the service with the full name ``service``, are
        sessions.
        """
        self._prefix = f"/{service}/"
        self._session_rpc = f"{self._prefix}{session_rpc}"
        self._sessions: set[asyncio.Task[Any]] = set()
        # Shutdown does not wait for them.
        self._beside: set[asyncio.Task[Any]] = set()  # other streams of the service: rollbacks
        self._others: set[asyncio.Task[Any]] = set()  # such as health watches
        self._reasons: dict[asyncio.Task[Any], str] = {}  # of streams that are being ended
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._refusal = ""
        self._end_reason = ""

    @property
    def num_sessions(self) -> int:
        """Number of open sessions."""
        return len(self._sessions)

    def refuse(self, reason: str) -> None:
        """Refuse new sessions from now on, with UNAVAILABLE and ``reason``; empty: let them in."""
        self._refusal = reason

    async def wait_until_empty(self) -> None:
        """Wait until no session is open."""
        await self._is_empty.wait()

    async def end_all(self, reason: str) -> None:
        """End every open stream with UNAVAILABLE and ``reason``."""
        self._end_reason = reason
        await self._end(self._sessions | self._beside | self._others, reason)

    async def end_sessions(self, reason: str) -> None:
        """End every open stream of the service with UNAVAILABLE and ``reason``."""
        await self._end(self._sessions | self._beside, reason)

    async def _end(self, streams: set[asyncio.Task[Any]], reason: str) -> None:
        for stream in streams:
            self._reasons[stream] = reason
            stream.cancel(reason)
        if streams:
            await asyncio.wait(streams, timeout=_ABORT_SECONDS)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handlers of streams; grpc calls this for each call."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler.response_streaming:
            return handler
        serve = handler.stream_stream or handler.unary_stream
        if not inspect.iscoroutinefunction(serve):
            return handler  # reflection, whose streams end by themselves
        streams = self._streams_of(str(handler_call_details.method))
        make_handler = (
            grpc.stream_stream_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_stream_rpc_method_handler
        )
        return make_handler(
            functools.partial(self._tracked, serve, streams),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def _streams_of(self, method: str) -> set[asyncio.Task[Any]]:
        if method == self._session_rpc:
            return self._sessions
        return self._beside if method.startswith(self._prefix) else self._others

    async def _tracked(
        self,
        serve: Call,
        streams: set[asyncio.Task[Any]],
        request: Any,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        if self._refusal and streams is self._sessions:
            await context.abort(grpc.StatusCode.UNAVAILABLE, status_details(self._refusal))
        task = asyncio.current_task()
        assert task is not None
        streams.add(task)
        self._update_is_empty()
        try:
            await serve(request, context)
        except asyncio.CancelledError:
            reason = self._reasons.get(task, self._end_reason)
            if not reason:
                raise  # the client cancelled
            task.uncancel()
            await context.abort(grpc.StatusCode.UNAVAILABLE, status_details(reason))
        finally:
            streams.discard(task)
            self._reasons.pop(task, None)
            self._update_is_empty()

    def _update_is_empty(self) -> None:
        if self._sessions:
            self._is_empty.clear()
        else:
            self._is_empty.set()
