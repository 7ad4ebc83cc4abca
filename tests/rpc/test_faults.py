"""Errors of a handler become gRPC statuses, and reveal nothing else."""

import asyncio
from typing import Any, cast

import grpc
import pytest
from google.protobuf.message import DecodeError

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


async def test_bytes_that_are_no_message_are_invalid_for_client_log_and_metrics_alike() -> None:
    status, details = await outcome(DecodeError("at byte 3"))
    assert status is faults.status_of(DecodeError("at byte 3"))
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert details == faults.UNREADABLE


async def test_a_cancelled_call_stays_cancelled() -> None:
    context = cast("faults.Context", RecordingContext())
    with pytest.raises(asyncio.CancelledError):
        await Service().Fail(asyncio.CancelledError(), context)


@pytest.mark.parametrize("character", ["a", "\xe9", "\u6f22", "\U0001f600"])
@pytest.mark.parametrize("length", [1, 255, 340, 1023, 1024, 1025, 20_000])
async def test_details_are_cut_to_one_kibibyte_of_utf8(character: str, length: int) -> None:
    message = "say: " + character * length
    status, details = await outcome(errors.InvalidInputError(message))
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    size = len(details.encode())
    assert size <= faults.MAX_DETAILS_BYTES
    if len(message.encode()) <= faults.MAX_DETAILS_BYTES:
        assert details == message
        return
    kept = details.removesuffix(" ... (cut)")
    assert kept != details
    assert message.startswith(kept)
    assert size > faults.MAX_DETAILS_BYTES - len(character.encode())


async def test_details_are_one_line_that_utf8_can_encode() -> None:
    _, details = await outcome(
        errors.InvalidInputError("one\r\ntwo\x00three \ud800 four\u2028five")
    )
    assert details == "one two three ? four five"


class FailedCall(grpc.RpcError):
    """A call that has failed, as grpc raises it."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.INVALID_ARGUMENT

    def details(self) -> str:
        return "x" * 9000


def test_the_error_of_a_failed_call_is_cut_too() -> None:
    found = faults.error_of(FailedCall(), "verify service")
    assert type(found) is errors.InvalidInputError
    assert str(found).startswith("verify service: xxx")
    assert len(str(found)) == faults.MAX_DETAILS_BYTES


async def test_an_unreadable_message_of_a_stream_is_the_requests_fault() -> None:
    status, details = await outcome(DecodeError("Error parsing message"))
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert ".proto" in details
