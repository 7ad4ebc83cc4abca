"""The one mapping between the errors of ``amusd.protocol.errors`` and gRPC statuses."""

import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio

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
    errors.StatusLostError: grpc.StatusCode.UNAVAILABLE,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
}
# What grpc.aio puts over a call's own status if a write meets the end of the call.
_STATUS_LOST = (grpc.StatusCode.INTERNAL, "Internal error from Core")
_ERROR_OF = {status: error for error, status in _STATUS_OF.items()}


Servicer = TypeVar("Servicer")
Request = TypeVar("Request")
Answer = TypeVar("Answer")
Context = grpc.aio.ServicerContext[Any, Any]
Handler = Callable[[Servicer, Request, Context], Awaitable[Answer]]


def reported(handler: Handler[Servicer, Request, Answer]) -> Handler[Servicer, Request, Answer]:
    """Let a handler's errors end its call with their status; a traceback never gets out."""

    @functools.wraps(handler)
    async def report(self: Servicer, request: Request, context: Context) -> Answer:
        try:
            return await handler(self, request, context)
        except errors.AmusdError as error:
            code, message = status_of(error), str(error)
        except grpc.aio.AbortError:
            raise
        except Exception:
            log.exception("an unexpected error ended a call")
            code, message = grpc.StatusCode.INTERNAL, "unexpected error: see the service's log"
        return await context.abort(code, message)

    return report


def status_of(error: Exception) -> grpc.StatusCode:
    """Return the status that a call ends with if ``error`` ends it."""
    if isinstance(error, errors.AmusdError):
        return _STATUS_OF.get(type(error), grpc.StatusCode.INTERNAL)
    return grpc.StatusCode.INTERNAL


def error_of_code(code: int, message: str) -> errors.AmusdError:
    """Return the error that an answer holds as a status code; UnavailableError for any other."""
    for status, kind in _ERROR_OF.items():
        if status.value[0] == code:
            return kind(message)
    return errors.UnavailableError(message)


def error_of(call_error: grpc.RpcError, service: str) -> errors.AmusdError:
    """Return the error that a call to ``service`` ended with, in this project's own terms."""
    # Every error that a call ends with is a grpc.Call, too, in either of grpc's interfaces.
    code: grpc.StatusCode = call_error.code()
    if (code, call_error.details()) == _STATUS_LOST:
        return errors.StatusLostError(f"{service}: has ended the call; its log says why")
    kind = _ERROR_OF.get(code, errors.UnavailableError)
    return kind(f"{service}: {call_error.details() or code.name}")
