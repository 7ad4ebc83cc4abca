"""The only mapping between the errors of ``amusd.protocol.errors`` and gRPC statuses."""

import asyncio
import contextlib
import functools
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from amusd.protocol import errors

log = logging.getLogger(__name__)

_STATUS_OF = {
    errors.InvalidInputError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.PreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.UnknownSessionError: grpc.StatusCode.NOT_FOUND,
    errors.DuplicateSessionError: grpc.StatusCode.ALREADY_EXISTS,
    errors.CacheFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.LimitExceededError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.NotServedError: grpc.StatusCode.UNIMPLEMENTED,
    errors.NotFiniteError: grpc.StatusCode.INTERNAL,
    errors.InternalError: grpc.StatusCode.INTERNAL,
    errors.StatusLostError: grpc.StatusCode.UNAVAILABLE,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
}
# grpc.aio replaces the status of a call with this if a write fails because the call has ended.
_STATUS_LOST = (grpc.StatusCode.INTERNAL, "Internal error from Core")
_ABORT_SECONDS = 1.0
_ERROR_OF = {status: error for error, status in _STATUS_OF.items()} | {
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidInputError,
    # The call was interrupted, whatever it asked for.
    grpc.StatusCode.ABORTED: errors.UnavailableError,
    grpc.StatusCode.CANCELLED: errors.UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.UnavailableError,
}

MAX_DETAILS_BYTES = 1024
"""Size of the details of a status, in UTF-8. gRPC percent-encodes them, up to three times as long,
and a peer replaces a status whose metadata exceeds its limit, often 8 KiB."""

_CUT = " ... (cut)"
_BREAKS = re.compile(r"[\x00-\x1f\x7f\u2028\u2029]+")

UNREADABLE = "the request is not a message of this method: send one as its .proto file defines it"


Servicer = TypeVar("Servicer")
Request = TypeVar("Request")
Response = TypeVar("Response")
Context = grpc.aio.ServicerContext[Any, Any]
Handler = Callable[[Servicer, Request, Context], Awaitable[Response]]


def reported(handler: Handler[Servicer, Request, Response]) -> Handler[Servicer, Request, Response]:
    """Decorate a handler so that an error ends the call with its status, without a traceback."""

    @functools.wraps(handler)
    async def report(self: Servicer, request: Request, context: Context) -> Response:
        try:
            return await handler(self, request, context)
        except errors.AmusdError as error:
            code, message = status_of(error), str(error)
        except grpc.aio.AbortError:
            raise
        except DecodeError as error:
            code, message = status_of(error), UNREADABLE
        except Exception:
            log.exception("an unexpected error ended a call")
            code, message = grpc.StatusCode.INTERNAL, "unexpected error: see the service's log"
        # The status waits for a peer that does not read; the handler does not.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ABORT_SECONDS):
                await context.abort(code, status_details(message))
        return None  # type: ignore[return-value]  # the status is on its way

    return report


def status_details(message: str) -> str:
    """Return ``message`` as the details of a status: one line of at most MAX_DETAILS_BYTES.

    What UTF-8 cannot encode, such as a lone surrogate, becomes a question mark.
    """
    line = _BREAKS.sub(" ", message)
    encoded = line.encode("utf-8", "replace")
    if len(encoded) <= MAX_DETAILS_BYTES:
        return encoded.decode()
    # A character that the cut splits is dropped.
    return encoded[: MAX_DETAILS_BYTES - len(_CUT)].decode("utf-8", "ignore") + _CUT


async def send_metadata(context: Context) -> None:
    """Send the metadata of a stream, before its first message.

    Otherwise they go with the first message. If writing that is interrupted, gRPC refuses to send
    them once more with the status, and the call never ends.
    """
    await context.send_initial_metadata(())


def status_of(error: Exception) -> grpc.StatusCode:
    """Return the status of a call that ``error`` ends."""
    if isinstance(error, errors.AmusdError):
        return _STATUS_OF.get(type(error), grpc.StatusCode.INTERNAL)
    if isinstance(error, DecodeError):  # of a message on a stream
        return grpc.StatusCode.INVALID_ARGUMENT
    return grpc.StatusCode.INTERNAL


def error_of_code(code: int, message: str) -> errors.AmusdError:
    """Return the error that an answer holds as a status code; UnavailableError for any other."""
    for status, kind in _ERROR_OF.items():
        if status.value[0] == code:
            return kind(message)
    return errors.UnavailableError(message)


def error_of(call_error: grpc.RpcError, service: str) -> errors.AmusdError:
    """Return the error of this project for a failed call to ``service``.

    A status that this project does not use, such as UNKNOWN, is an InternalError: the request may
    be the cause, and another replica may fail on it too.
    """
    # Every such error is also a grpc.Call, with grpc and with grpc.aio.
    code: grpc.StatusCode = call_error.code()
    if (code, call_error.details()) == _STATUS_LOST:
        return errors.StatusLostError(f"{service}: ended the call; its log says why")
    kind = _ERROR_OF.get(code, errors.InternalError)
    return kind(status_details(f"{service}: {call_error.details() or code.name}"))
