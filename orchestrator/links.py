"""The two streams of a session: what comes in becomes events, what goes out stays in order.

Each link is made by its session, which runs ``read`` and ``write`` as tasks, and cancels them and
the call at its end. A stream that ends is an event like any other, not an exception. The inbox
is bounded: while it is full, gRPC's flow control holds the services back.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import grpc.aio

from amusd.protocol.errors import AmusdError, UnavailableError
from amusd.protocol.events import Advance, Forward, Proposal, Rollback, Verdict
from amusd.protocol.strategy import DraftPlan
from amusd.rpc import codec, faults
from amusd.v1 import draft_pb2, draft_pb2_grpc, verify_pb2, verify_pb2_grpc
from orchestrator.replica_pool import Lease

_MAX_OUTGOING = 256

Role = Literal["draft", "verify"]
Metadata = tuple[tuple[str, str], ...]
Request = TypeVar("Request")
Response = TypeVar("Response")


@dataclass(frozen=True, slots=True)
class LinkLost:
    """A link has ended before its session."""

    role: Role
    error: AmusdError
    link: object  # which: a session may have had others


Event = Proposal | Verdict | LinkLost
Inbox = asyncio.Queue[Event]


@dataclass(frozen=True, slots=True)
class SessionOpening:
    """What a session is opened with, on both sides. ``max_position`` in tokens."""

    session_id: str
    tokens: tuple[int, ...]
    max_position: int
    vocabulary_fingerprint: str
    epoch: int = 0


class VerifyLink:
    """The Verify stream of one session, and its lease on a replica."""

    def __init__(
        self,
        lease: "Lease[verify_pb2_grpc.VerifyServiceAsyncStub]",
        inbox: Inbox,
        metadata: Metadata | None = None,
    ) -> None:
        """Start the call with ``metadata``; verdicts go to ``inbox``."""
        self.address = lease.address
        self._lease = lease
        # None: requests are written one by one
        self._call = lease.stub.Verify(None, metadata=metadata)
        self._inbox = inbox

    async def open(self, opening: SessionOpening) -> None:
        """Open the session."""
        request = verify_pb2.VerifyOpen(
            session_id=opening.session_id,
            token_ids=opening.tokens,
            max_position=opening.max_position,
            epoch=opening.epoch,
            vocabulary_fingerprint=opening.vocabulary_fingerprint,
        )
        await _write(self._call, verify_pb2.VerifyRequest(open=request))

    async def send(self, forward: Forward) -> None:
        """Send tokens to check."""
        await _write(self._call, codec.forward_to_proto(forward))

    async def read(self) -> None:
        """Carry verdicts to the inbox until the stream ends."""
        error = await _pump(
            self._call, "verify", lambda got: codec.verdict_from_proto(got.verdict), self._inbox
        )
        await self._inbox.put(LinkLost("verify", error, self))

    def cancel(self) -> None:
        """End the session on the service."""
        self._call.cancel()
        self._lease.give_up()


class DraftLink:
    """The Propose stream of one session, the rollbacks beside it, and its lease on a replica.

    Advances and rollbacks travel on different streams, so one is sent only when the one before
    it has arrived; a bounded queue holds the others.
    """

    def __init__(
        self,
        lease: "Lease[draft_pb2_grpc.DraftServiceAsyncStub]",
        session_id: str,
        inbox: Inbox,
        timeout_seconds: float,
        metadata: Metadata | None = None,
    ) -> None:
        """Start the call with ``metadata``; proposals go to ``inbox``."""
        self.address = lease.address
        self.has_answered = False
        self._lease = lease
        # None: requests are written one by one
        self._call = lease.stub.Propose(None, metadata=metadata)
        self._session_id = session_id
        self._inbox = inbox
        self._timeout_seconds = timeout_seconds
        self._outgoing: asyncio.Queue[Advance | Rollback] = asyncio.Queue(_MAX_OUTGOING)

    async def open(self, opening: SessionOpening, plan: DraftPlan) -> None:
        """Open the session."""
        request = draft_pb2.ProposeOpen(
            session_id=opening.session_id,
            token_ids=opening.tokens,
            lookahead=plan.lookahead,
            tokens_per_proposal=plan.tokens_per_proposal,
            max_position=opening.max_position,
            vocabulary_fingerprint=opening.vocabulary_fingerprint,
            epoch=opening.epoch,
        )
        await _write(self._call, draft_pb2.ProposeRequest(open=request))

    def send(self, message: Advance | Rollback) -> None:
        """Queue a message; ``write`` sends it at the next opportunity.

        Raises:
            UnavailableError: too many messages wait; the draft does not keep up.
        """
        try:
            self._outgoing.put_nowait(message)
        except asyncio.QueueFull:
            raise UnavailableError("draft service: does not take its messages") from None

    async def write(self) -> None:
        """Send what is queued, in order, until the service refuses."""
        try:
            while True:
                message = await self._outgoing.get()
                if isinstance(message, Advance):
                    await _write(self._call, codec.advance_to_proto(message))
                else:
                    await self._lease.stub.Rollback(
                        codec.rollback_to_proto(message, self._session_id),
                        timeout=self._timeout_seconds,
                    )
        except grpc.aio.AioRpcError as error:
            await self._inbox.put(LinkLost("draft", faults.error_of(error, "draft service"), self))

    async def read(self) -> None:
        """Carry proposals to the inbox until the stream ends."""
        error = await _pump(self._call, "draft", self._decode, self._inbox)
        await self._inbox.put(LinkLost("draft", error, self))

    def cancel(self) -> None:
        """End the session on the service."""
        self._call.cancel()
        self._lease.give_up()

    def _decode(self, response: draft_pb2.ProposeResponse) -> Proposal:
        self.has_answered = True
        return codec.proposal_from_proto(response.proposal)


async def _write(call: "grpc.aio.StreamStreamCall[Request, Response]", request: Request) -> None:
    """Write; if the stream has ended, its reader says why, and nothing is said here."""
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await call.write(request)


async def _pump(
    call: "grpc.aio.StreamStreamCall[Request, Response]",
    role: Role,
    decode: Callable[[Response], Proposal | Verdict],
    inbox: Inbox,
) -> AmusdError:
    """Carry responses to the inbox; return why the stream has ended."""
    try:
        async for response in call:
            await inbox.put(decode(response))
    except grpc.aio.AioRpcError as call_error:
        return faults.error_of(call_error, f"{role} service")
    return UnavailableError(f"{role} service: ended the session")
