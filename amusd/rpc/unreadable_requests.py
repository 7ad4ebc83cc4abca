"""Refuses requests whose bytes are no message of their method.

gRPC itself ends such a call with UNKNOWN, the name of an exception, and a traceback in the log. On
streams of requests, ``faults.reported`` refuses them.
"""

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from amusd.rpc.faults import UNREADABLE

_NO_MESSAGE = object()


class UnreadableRequests(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # only in its stub
    """Ends the calls of one request that cannot be parsed with INVALID_ARGUMENT."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handlers that take one request; grpc calls this for each call."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        serve = handler.unary_stream or handler.unary_unary
        if not inspect.iscoroutinefunction(serve):
            return handler

        async def checked(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            if request is _NO_MESSAGE:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, UNREADABLE)
            return await serve(request, context)

        make_handler = (
            grpc.unary_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return make_handler(
            checked, _reader(handler.request_deserializer), handler.response_serializer
        )


def _reader(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Return a deserializer that returns a marker for what ``deserialize`` cannot parse."""

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _NO_MESSAGE

    return read
