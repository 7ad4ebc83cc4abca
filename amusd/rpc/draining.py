"""How a service ends in good order: new sessions are refused, and open ones may finish.

A *session* is a call of Generate, Propose or Verify. Only those are refused while a service drains.
Everything else is answered until the very end: the rollbacks of open sessions, and health. That is
why the server itself is stopped last: once it stops it accepts no calls at all.
"""

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

Call = Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Awaitable[Any]]

_ABORT_SECONDS = 2.0


class Drain(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # only its stub is generic
    """Knows the open streams of one server, and lets no session in once it drains.

    Lives on the server's event loop. Each stream's entry is made and removed by its own call.
    """

    def __init__(self, service: str, session_rpc: str) -> None:
        """Watch over the streams of a server.

        Calls of ``session_rpc``, a stream of the service with the full name ``service``, are
        sessions.
        """
        self._session_rpc = f"/{service}/{session_rpc}"
        self._sessions: set[asyncio.Task[Any]] = set()
        self._others: set[asyncio.Task[Any]] = set()  # such as watches of health: never waited for
        self._no_session = asyncio.Event()
        self._no_session.set()
        self._refusal = ""
        self._last_words = ""

    @property
    def num_sessions(self) -> int:
        """Number of sessions that are open."""
        return len(self._sessions)

    def refuse(self, why: str) -> None:
        """Refuse sessions from now on with UNAVAILABLE and ``why``."""
        self._refusal = why

    async def wait_until_empty(self) -> None:
        """Return when no session is open."""
        await self._no_session.wait()

    async def end_all(self, why: str) -> None:
        """End every stream that is open with UNAVAILABLE and ``why``."""
        self._last_words = why
        streams = self._sessions | self._others
        for stream in streams:
            stream.cancel()
        if streams:
            await asyncio.wait(streams, timeout=_ABORT_SECONDS)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handlers of streams; grpc calls this once a call."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler.response_streaming:
            return handler
        serve = handler.stream_stream or handler.unary_stream
        if not inspect.iscoroutinefunction(serve):
            return handler  # reflection: ends with the call that it is for
        is_session = str(handler_call_details.method) == self._session_rpc
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_stream_rpc_method_handler
        )
        return make(
            functools.partial(self._watched, serve, self._sessions if is_session else self._others),
            handler.request_deserializer,
            handler.response_serializer,
        )

    async def _watched(
        self,
        serve: Call,
        streams: set[asyncio.Task[Any]],
        request: Any,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        if self._refusal and streams is self._sessions:
            await context.abort(grpc.StatusCode.UNAVAILABLE, self._refusal)
        task = asyncio.current_task()
        assert task is not None
        streams.add(task)
        self._note()
        try:
            await serve(request, context)
        except asyncio.CancelledError:
            if not self._last_words:
                raise  # the client cancelled
            task.uncancel()
            await context.abort(grpc.StatusCode.UNAVAILABLE, self._last_words)
        finally:
            streams.discard(task)
            self._note()

    def _note(self) -> None:
        if self._sessions:
            self._no_session.clear()
        else:
            self._no_session.set()
