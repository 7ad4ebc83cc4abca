"""The calls of a session to its draft and verify replica.

A link turns what comes in into events for its session, and puts what goes out in order. Its two
tasks, a reader and a writer, are made with it and end with ``cancel``. Sending never waits: a
bounded outbox holds what is not written yet, and a service that does not read loses the link.
A call that ends is an event like any other, not an exception.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import grpc.aio

from amusd.fleet.failover import Ending
from amusd.protocol.errors import (
    AmusdError,
    InternalError,
    StatusLostError,
    UnavailableError,
    UnknownSessionError,
)
from amusd.protocol.events import Advance, Forward, Proposal, Rollback, Verdict
from amusd.protocol.strategy import DraftPlan
from amusd.rpc import codec, faults, sampling_codec
from amusd.rpc.outbox import Outbox
from amusd.sampling.parameters import GREEDY, SequenceSampling
from amusd.v1 import draft_pb2, verify_pb2, verify_pb2_grpc
from orchestrator.replica_pool import Lease
from orchestrator.rollback_stream import DraftStub

log = logging.getLogger(__name__)

_MAX_OUTGOING = 1024
_STATUS_WAIT_SECONDS = 0.5  # for the status of a session that a rollback did not find
_REFUSAL_SECONDS = 2.0  # a replica that ends a session later had begun with it

Role = Literal["draft", "verify"]
Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class LinkLost:
    """A link has ended before its session, or has to."""

    role: Role
    error: AmusdError
    link: object  # a session may have had others before
    ending: Ending = Ending.FAILED


Event = Proposal | Verdict | LinkLost
Sink = Callable[[Event], None]
"""Takes an event of a session, at once."""


@dataclass(frozen=True, slots=True)
class SessionOpening:
    """What a session is opened with, on both sides. ``max_position`` in tokens."""

    session_id: str
    tokens: tuple[int, ...]
    max_position: int
    vocabulary_fingerprint: str
    epoch: int = 0
    records_times: bool = False
    max_branches: int = 0
    sampling: SequenceSampling = GREEDY
    min_use_probability: float = 0.0


class _Stream:
    """The reader and the writer of one call."""

    def __init__(
        self,
        call: "grpc.aio.StreamStreamCall[Any, Any]",
        role: Role,
        receive: Callable[[Any], None],
        lose: Callable[[AmusdError, Ending], None],
        lease: Lease[Any],
    ) -> None:
        self.has_answered = False
        self._call = call
        self._role = role
        self._receive = receive
        self._lose = lose
        self._lease = lease
        self._has_written = False
        self._opened_seconds = time.monotonic()
        self._outbox: Outbox[Any] = Outbox(_MAX_OUTGOING)
        self.tasks = (asyncio.create_task(self._read()), asyncio.create_task(self._write()))

    def put(self, request: Any) -> None:
        self._outbox.put(request)

    def cancel(self) -> None:
        self._call.cancel()
        for task in self.tasks:
            task.cancel()

    async def _read(self) -> None:
        """Hand responses over as they come, then say why the call has ended."""
        service = f"{self._role} service"
        try:
            async for response in self._call:
                self.has_answered = True
                self._lease.served()
                self._receive(response)
            error: AmusdError = UnavailableError(f"{service}: ended the session")
        except grpc.aio.AioRpcError as call_error:
            error = faults.error_of(call_error, service)
        except Exception:  # of whatever kind: it ends this session, and no other
            log.exception("a message of the %s at %s cannot be read", service, self._lease.address)
            error = InternalError(f"{service}: sent a message that cannot be read")
        self._lose(error, self._ending(error))

    def _ending(self, error: AmusdError) -> Ending:
        """Return what the end of the call says about the session."""
        match error:
            case StatusLostError():
                # A session that was refused has had no message.
                return Ending.FAILED if self.has_answered else Ending.UNKNOWN
            case InternalError():
                return Ending.FAILED
            case UnavailableError():
                is_quick = time.monotonic() - self._opened_seconds < _REFUSAL_SECONDS
                # A service that shuts down says so over its connection.
                was_told = self._lease.is_connected and (is_quick or self.has_answered)
                is_refused = was_told or not self._has_written
                return Ending.REFUSED if is_refused else Ending.FAILED
            case _:
                return Ending.FINAL

    async def _write(self) -> None:
        try:
            await self._outbox.drain(self._write_one)
        except AmusdError:
            error = UnavailableError(f"{self._role} service: does not take its messages")
            self._lose(error, Ending.FAILED)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the call has ended; its reader says why

    async def _write_one(self, request: Any) -> None:
        await self._call.write(request)
        self._has_written = True


class VerifyLink:
    """The Verify stream of one session, and its lease on a replica."""

    def __init__(
        self,
        lease: "Lease[verify_pb2_grpc.VerifyServiceAsyncStub]",
        sink: Sink,
        metadata: Metadata | None = None,
    ) -> None:
        """Start the call with ``metadata``; verdicts go to ``sink``."""
        self.address = lease.address
        self.lease = lease
        self.ended_seconds = math.inf
        """When the link was cancelled, by ``time.monotonic``."""
        call = lease.stub.Verify(None, metadata=metadata)  # None: requests are written one by one
        self._stream = _Stream(
            call,
            "verify",
            lambda response: sink(codec.verdict_from_proto(response.verdict)),
            lambda error, ending: sink(LinkLost("verify", error, self, ending)),
            lease,
        )

    @property
    def tasks(self) -> tuple[asyncio.Task[None], ...]:
        """The reader and the writer."""
        return self._stream.tasks

    def open(self, opening: SessionOpening) -> None:
        """Open the session."""
        request = verify_pb2.VerifyOpen(
            session_id=opening.session_id,
            token_ids=opening.tokens,
            max_position=opening.max_position,
            epoch=opening.epoch,
            vocabulary_fingerprint=opening.vocabulary_fingerprint,
            record_times=opening.records_times,
            sampling=sampling_codec.sampling_to_proto(opening.sampling.parameters),
            context=sampling_codec.context_to_proto(opening.sampling),
            logprobs=sampling_codec.options_to_proto(opening.sampling.logprobs),
        )
        self._stream.put(verify_pb2.VerifyRequest(open=request))

    def send(self, forward: Forward) -> None:
        """Send tokens to check."""
        self._stream.put(codec.forward_to_proto(forward))

    def cancel(self) -> None:
        """End the session on the service."""
        self.ended_seconds = min(self.ended_seconds, time.monotonic())
        self._stream.cancel()
        self.lease.release()


class DraftLink:
    """The Propose stream of one session, its rollbacks, and its lease on a replica.

    Rollbacks travel on another call than advances. An advance that follows a rollback waits until
    the rollback is answered; a rollback never waits.
    """

    def __init__(
        self,
        lease: "Lease[DraftStub]",
        session_id: str,
        sink: Sink,
        timeout_seconds: float,
        metadata: Metadata | None = None,
    ) -> None:
        """Start the call with ``metadata``; proposals go to ``sink``.

        A rollback has to be answered within ``timeout_seconds``.
        """
        self.address = lease.address
        self.lease = lease
        self._session_id = session_id
        self._sink = sink
        self._timeout_seconds = timeout_seconds
        self._held: list[Advance] = []  # behind a rollback that is not answered yet
        self._rolling_back_to: int | None = None  # the epoch of that rollback
        self._timer: asyncio.TimerHandle | None = None
        self._stream = _Stream(
            lease.stub.propose(metadata),
            "draft",
            lambda response: sink(codec.proposal_from_proto(response.proposal)),
            self._lose,
            lease,
        )
        lease.stub.rollbacks.attach(session_id, self)

    @property
    def tasks(self) -> tuple[asyncio.Task[None], ...]:
        """The reader and the writer."""
        return self._stream.tasks

    @property
    def has_answered(self) -> bool:
        """Whether the replica has proposed anything, or said that it has nothing to propose."""
        return self._stream.has_answered

    def open(self, opening: SessionOpening, plan: DraftPlan) -> None:
        """Open the session."""
        request = draft_pb2.ProposeOpen(
            session_id=opening.session_id,
            token_ids=opening.tokens,
            lookahead=plan.lookahead,
            tokens_per_proposal=plan.tokens_per_proposal,
            max_position=opening.max_position,
            vocabulary_fingerprint=opening.vocabulary_fingerprint,
            epoch=opening.epoch,
            record_times=opening.records_times,
            max_branches=opening.max_branches,
            sampling=sampling_codec.sampling_to_proto(opening.sampling.parameters),
            context=sampling_codec.context_to_proto(opening.sampling),
            min_use_probability=opening.min_use_probability,
        )
        self._stream.put(draft_pb2.ProposeRequest(open=request))

    def send(self, message: Advance | Rollback) -> None:
        """Send a message."""
        if isinstance(message, Rollback):
            self.lease.stub.rollbacks.send(codec.rollback_to_proto(message, self._session_id))
            self._held.clear()  # of an older epoch
            self._rolling_back_to = message.epoch
            self._expect_answer()
        elif self._rolling_back_to is not None:
            self._held.append(message)
            if len(self._held) > _MAX_OUTGOING:
                self._lose(UnavailableError("draft service: does not answer its rollbacks"))
        else:
            self._stream.put(codec.advance_to_proto(message))

    def answered(self, response: draft_pb2.RollbackResponse) -> None:
        """Take the answer to a rollback of this session."""
        if response.HasField("error"):
            refusal = response.error
            error = faults.error_of_code(refusal.code, f"draft service: {refusal.message}")
            if isinstance(error, UnknownSessionError):
                self._await_status(error)
            else:
                self._lose(error)
            return
        self.lease.replica.answers.rolled_back()
        if response.epoch == self._rolling_back_to:
            self._rolling_back_to = None
            self._stop_timer()
            for advance in self._held:
                self._stream.put(codec.advance_to_proto(advance))
            self._held.clear()

    def rollbacks_lost(self, error: AmusdError) -> None:
        """Lose the draft if a rollback is not answered: the replica's rollback stream has ended."""
        if self._rolling_back_to is not None:
            self._lose(error)

    def cancel(self) -> None:
        """End the session on the service."""
        self._stop_timer()
        self.lease.stub.rollbacks.detach(self._session_id, self)
        self._stream.cancel()
        self.lease.release()

    def _lose(self, error: AmusdError, ending: Ending = Ending.FAILED) -> None:
        self._stop_timer()
        self._sink(LinkLost("draft", error, self, ending))

    def _await_status(self, error: AmusdError) -> None:
        """Lose the draft, with the reason that the session's own stream gives if it comes."""
        self._stop_timer()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_STATUS_WAIT_SECONDS, self._lose, error)

    def _expect_answer(self) -> None:
        self._stop_timer()
        self._timer = asyncio.get_running_loop().call_later(
            self._timeout_seconds, self._rollback_is_late, time.monotonic()
        )

    def _rollback_is_late(self, since_seconds: float) -> None:
        reason = f"no answer to a rollback within {self._timeout_seconds:g} s"
        answers = self.lease.replica.answers
        answers.rollback_failed(since_seconds, time.monotonic(), reason)
        self._lose(UnavailableError(f"draft service: {reason}"))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
