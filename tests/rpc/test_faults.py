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


STATUSES = [
    (errors.InvalidInputError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.PreconditionError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.UnknownSessionError, grpc.StatusCode.NOT_FOUND),
    (errors.DuplicateSessionError, grpc.StatusCode.ALREADY_EXISTS),
    (errors.LimitExceededError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.NotServedError, grpc.StatusCode.UNIMPLEMENTED),
    (errors.InternalError, grpc.StatusCode.INTERNAL),
    (errors.UnavailableError, grpc.StatusCode.UNAVAILABLE),
]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        *STATUSES,
        (errors.CacheFullError, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.StatusLostError, grpc.StatusCode.UNAVAILABLE),
        (errors.AmusdError, grpc.StatusCode.INTERNAL),
    ],
)
async def test_every_error_of_the_project_has_its_status_and_keeps_its_message(
    error: type[errors.AmusdError], status: grpc.StatusCode
) -> None:
    assert await outcome(error("do this")) == (status, "do this")


def below(kind: type[errors.AmusdError]) -> set[type[errors.AmusdError]]:
    """Return all kinds of errors below ``kind``."""
    children = set(kind.__subclasses__())
    return children.union(*map(below, children))


def test_no_error_of_the_project_is_without_a_status() -> None:
    kinds = below(errors.AmusdError)
    assert {errors.CacheFullError, errors.StatusLostError} < kinds
    assert kinds <= set(faults._STATUS_OF)


@pytest.mark.parametrize(("error", "status"), STATUSES)
def test_a_status_code_in_an_answer_becomes_its_error_again(
    error: type[errors.AmusdError], status: grpc.StatusCode
) -> None:
    code: int = status.value[0]
    found = faults.error_of_code(code, "do this")
    assert type(found) is error
    assert str(found) == "do this"


@pytest.mark.parametrize("code", [0, 99])
def test_any_other_status_code_in_an_answer_means_unavailable(code: int) -> None:
    found = faults.error_of_code(code, "do this")
    assert type(found) is errors.UnavailableError
    assert str(found) == "do this"


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
