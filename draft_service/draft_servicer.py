"""The gRPC face of the draft service: only awaits and translates, never drafts."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TypeAlias

from amusd.observe.observer import Observer
from amusd.protocol.draft_limits import DraftLimits
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.errors import AmusdError, InvalidInputError
from amusd.protocol.events import Advance, Proposal
from amusd.rpc import codec, faults, model_codec
from amusd.rpc.outbox import Outbox
from amusd.rpc.sampling_codec import sequence_sampling_from_proto
from amusd.rpc.stream_limits import MAX_MESSAGES_WAITING, check_session_id
from amusd.serving.engine_thread import CommandWindow, EngineThread
from amusd.serving.preparation import constraint_preparation
from amusd.serving.session_stream import SessionStreams, StreamShape
from amusd.v1 import draft_pb2, draft_pb2_grpc
from draft_service.drafting import DraftOpening, DraftWorker


class DraftServicer(draft_pb2_grpc.DraftServiceServicer):
    """Opens sessions on the engine thread and carries messages to and from it."""

    def __init__(
        self, engine: EngineThread[DraftWorker], max_wait_seconds: float, observer: Observer
    ) -> None:
        """Serve the worker of ``engine``, once it is ready.

        A session waits for memory for at most ``max_wait_seconds``.
        """
        self._observer = observer
        self._engine = engine
        self._streams = SessionStreams(_SHAPE, engine, max_wait_seconds, observer)

    @faults.reported
    async def Propose(  # type: ignore[override]
        self, request_iterator: AsyncIterator[draft_pb2.ProposeRequest], context: faults.Context
    ) -> None:
        """See the protocol."""
        await self._streams.serve(request_iterator, context)

    @faults.reported
    async def Rollback(  # type: ignore[override]
        self, request_iterator: AsyncIterator[draft_pb2.RollbackRequest], context: faults.Context
    ) -> None:
        """See the protocol."""
        await faults.send_metadata(context)
        outcomes: Outbox[_Outcome] = Outbox(MAX_MESSAGES_WAITING)
        reader = asyncio.create_task(self._receive_rollbacks(request_iterator, outcomes))

        async def write(outcome: _Outcome) -> None:
            await context.write(self._answer(outcome))

        try:
            await outcomes.drain(write)
            await reader
        finally:
            reader.cancel()

    @faults.reported
    async def GetDraftInfo(
        self, request: draft_pb2.GetDraftInfoRequest, context: faults.Context
    ) -> draft_pb2.GetDraftInfoResponse:
        """See the protocol."""
        return await asyncio.wrap_future(self._engine.submit(_info))

    async def _receive_rollbacks(
        self,
        requests: AsyncIterator[draft_pb2.RollbackRequest],
        outcomes: "Outbox[_Outcome]",
    ) -> None:
        """Carry rollbacks to the engine thread; return when all of them have an outcome."""
        put = partial(self._engine.postbox.put, outcomes)
        window = CommandWindow(self._engine)
        try:
            async for request in requests:
                await window.post(partial(_roll_back, request=request, put=put))
            await asyncio.wrap_future(self._engine.submit(lambda worker: worker.flush()))
        finally:
            outcomes.close()

    def _answer(self, outcome: "_Outcome") -> draft_pb2.RollbackResponse:
        """Return the response to a rollback, and count it if it is done."""
        request, found = outcome
        response = draft_pb2.RollbackResponse(session_id=request.session_id, epoch=request.epoch)
        if isinstance(found, AmusdError):
            code: int = faults.status_of(found).value[0]
            response.error.code = code
            response.error.message = faults.status_details(str(found))
        else:
            response.num_dropped = found
            self._observer.rolled_back(request.session_id, codec.rollback_from_proto(request))
        return response


_Outcome: TypeAlias = "tuple[draft_pb2.RollbackRequest, int | AmusdError]"
"""A rollback, and how many tokens it dropped or why it was refused."""


def _roll_back(
    worker: DraftWorker,
    request: draft_pb2.RollbackRequest,
    put: Callable[[_Outcome], None],
) -> None:
    """Roll a session back on the engine thread."""
    found: int | AmusdError
    try:
        if request.verified_position < 1:
            raise InvalidInputError("verified_position is 0: the corrected token counts too")
        found = worker.rollback(request.session_id, codec.rollback_from_proto(request))
    except AmusdError as error:
        found = error
    put((request, found))


def _opening(request: draft_pb2.ProposeOpen) -> DraftOpening:
    check_session_id(request.session_id)
    return DraftOpening(
        session_id=request.session_id,
        tokens=list(request.token_ids),
        limits=DraftLimits(
            lookahead=request.lookahead,
            max_position=request.max_position,
            tokens_per_proposal=request.tokens_per_proposal or 1,
            max_branches=request.max_branches,
            min_use_probability=request.min_use_probability,
        ),
        epoch=request.epoch,
        vocabulary_fingerprint=request.vocabulary_fingerprint,
        records_times=request.record_times,
        sampling=sequence_sampling_from_proto(request),
    )


_SHAPE: StreamShape[Advance, Proposal] = StreamShape(
    rpc="Propose",
    step="advance",
    opening=_opening,
    event=codec.advance_from_proto,
    response=codec.proposal_to_proto,
    record=lambda watch, proposal: watch.proposed(proposal),
    preparation=constraint_preparation,
)


def _info(worker: DraftWorker) -> draft_pb2.GetDraftInfoResponse:
    drafter = worker.drafter
    return draft_pb2.GetDraftInfoResponse(
        model=model_codec.model_to_proto(worker.engine.description),
        limits=model_codec.limits_to_proto(worker.limits),
        num_sessions=worker.num_sessions,
        num_waiting=worker.num_waiting,
        cache=model_codec.usage_to_proto(worker.engine.usage),
        sources=[codec.source_to_proto(one) for one in DraftSource if one in drafter.sources],
    )
