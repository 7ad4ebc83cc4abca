"""Errors of a handler become gRPC statuses, and reveal nothing else."""

import asyncio
from typing import Any, cast

import grpc
import pytest

from amusd.protocol import errors
from amusd.rpc import faults


class Aborted(Exception):  # noqa: N818  # replaces grpc's own exception
    """Carries the status and details that a call was aborted with."""


class RecordingContext:
    """Aborts a call as grpc does, with an exception."""

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise Aborted(code, details)


class Service:
    """A servicer whose method raises its request."""

    @faults.reported
    async def Fail(self, request: BaseException, context: Any) -> None:  # noqa: N802
        raise request


async def outcome(error: BaseException) -> tuple[grpc.StatusCode, str]:
    context = cast("faults.Context", RecordingContext())
    with pytest.raises(Aborted) as caught:
        await Service().Fail(error, context)
    code, details = caught.value.args
    return code, details


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.InvalidInputError, grpc.StatusCode.INVALID_ARGUMENT),
        (errors.PreconditionError, grpc.StatusCode.FAILED_PRECONDITION),
        (errors.UnknownSessionError, grpc.StatusCode.NOT_FOUND),
        (errors.DuplicateSessionError, grpc.StatusCode.ALREADY_EXISTS),
        (errors.LimitExceededError, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.NotServedError, grpc.StatusCode.UNIMPLEMENTED),
        (errors.UnavailableError, grpc.StatusCode.UNAVAILABLE),
        (errors.StatusLostError, grpc.StatusCode.UNAVAILABLE),
        (errors.AmusdError, grpc.StatusCode.INTERNAL),
    ],
)
async def test_every_error_of_the_project_has_its_status_and_keeps_its_message(
    error: type[errors.AmusdError], status: grpc.StatusCode
) -> None:
    assert await outcome(error("do this")) == (status, "do this")


def test_no_error_of_the_project_is_without_a_status() -> None:
    assert set(errors.AmusdError.__subclasses__()) <= set(faults._STATUS_OF)


async def test_an_unexpected_error_is_logged_but_not_sent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    status, details = await outcome(ZeroDivisionError("secret"))
    assert status is grpc.StatusCode.INTERNAL
    assert "secret" not in details
    assert "secret" in caplog.text


async def test_a_cancelled_call_stays_cancelled() -> None:
    context = cast("faults.Context", RecordingContext())
    with pytest.raises(asyncio.CancelledError):
        await Service().Fail(asyncio.CancelledError(), context)
