"""The Rollback stream from this orchestrator to one draft replica, and the replica's stub.

One call carries the rollbacks of all sessions there. It is opened with the first of them, and anew
after it has broken. Its task ends with the replica's channel.
"""

import asyncio
import logging
from typing import Protocol

import grpc.aio

from amusd.protocol.errors import AmusdError, InternalError, UnavailableError
from amusd.rpc import faults
from amusd.rpc.outbox import Outbox
from amusd.v1 import draft_pb2, draft_pb2_grpc

log = logging.getLogger(__name__)

_MAX_OUTGOING = 4096


class Listener(Protocol):
    """A session that rolls back over the stream."""

    def answered(self, response: draft_pb2.RollbackResponse) -> None:
        """Take the answer to a rollback."""

    def rollbacks_lost(self, error: AmusdError) -> None:
        """The stream has ended: rollbacks without an answer will get none."""


class RollbackStream:
    """Sends rollbacks of any session, and hands the answers out by session."""

    def __init__(self, stub: "draft_pb2_grpc.DraftServiceAsyncStub") -> None:
        """Prepare a stream over ``stub``; nothing is called yet."""
        self._stub = stub
        self._listeners: dict[str, Listener] = {}
        self._outbox: Outbox[draft_pb2.RollbackRequest] = Outbox(_MAX_OUTGOING)
        self._task: asyncio.Task[None] | None = None

    def attach(self, session_id: str, listener: Listener) -> None:
        """Give ``listener`` the answers for a session from now on."""
        self._listeners[session_id] = listener
        self._keep_open()

    def detach(self, session_id: str, listener: Listener) -> None:
        """Forget the listener of a session, unless it has another one by now."""
        if self._listeners.get(session_id) is listener:
            del self._listeners[session_id]

    def send(self, request: draft_pb2.RollbackRequest) -> None:
        """Send a rollback; its session's listener gets the answer."""
        self._keep_open()
        self._outbox.put(request)

    def _keep_open(self) -> None:
        if self._task is None or self._task.done():
            self._outbox = Outbox(_MAX_OUTGOING)
            self._task = asyncio.create_task(self._run(self._outbox))

    async def _run(self, outbox: Outbox[draft_pb2.RollbackRequest]) -> None:
        call = self._stub.Rollback(None)  # None: requests are written one by one
        writer = asyncio.create_task(_write(outbox, call))
        error: AmusdError = UnavailableError("draft service: ended the rollback stream")
        try:
            async for response in call:
                self._hand_over(response)
        except grpc.aio.AioRpcError as call_error:
            error = faults.error_of(call_error, "draft service")
        except asyncio.CancelledError:
            if not call.cancelled():
                raise  # this task was cancelled, not the call
            error = UnavailableError("draft service: does not take its rollbacks")
        finally:
            writer.cancel()
            call.cancel()
        for listener in list(self._listeners.values()):
            listener.rollbacks_lost(error)

    def _hand_over(self, response: draft_pb2.RollbackResponse) -> None:
        """Hand an answer to its session; the session's fault does not end the stream."""
        listener = self._listeners.get(response.session_id)
        if listener is None:
            return
        try:
            listener.answered(response)
        except Exception:
            log.exception("an answer to a rollback cannot be taken")
            listener.rollbacks_lost(InternalError("draft service: its answer cannot be taken"))


async def _write(
    outbox: Outbox[draft_pb2.RollbackRequest],
    call: "grpc.aio.StreamStreamCall[draft_pb2.RollbackRequest, draft_pb2.RollbackResponse]",
) -> None:
    try:
        await outbox.drain(call.write)
    except AmusdError:
        call.cancel()  # the replica does not read: the reader ends, and says so
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass  # the call has ended; its reader says why


class DraftStub:
    """What an orchestrator calls on a draft replica."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        """Call over ``channel``."""
        self._stub: draft_pb2_grpc.DraftServiceAsyncStub = draft_pb2_grpc.DraftServiceStub(channel)
        self.rollbacks = RollbackStream(self._stub)

    def propose(
        self, metadata: tuple[tuple[str, str], ...] | None
    ) -> "grpc.aio.StreamStreamCall[draft_pb2.ProposeRequest, draft_pb2.ProposeResponse]":
        """Start a Propose stream whose requests are written one by one."""
        return self._stub.Propose(None, metadata=metadata)

    async def info(self, timeout_seconds: float) -> draft_pb2.GetDraftInfoResponse:
        """Return what the replica serves."""
        return await self._stub.GetDraftInfo(
            draft_pb2.GetDraftInfoRequest(), timeout=timeout_seconds
        )
