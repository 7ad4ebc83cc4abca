"""The gRPC face of the draft service: only awaits and translates, never drafts."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial

from amusd.observe.observer import Observer
from amusd.protocol.draft_session import DraftLimits
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.events import Advance, Proposal, Rollback
from amusd.rpc import codec, faults
from amusd.rpc.outbox import Outbox, until_first_ends
from amusd.rpc.stream_limits import MAX_MESSAGES_WAITING, CommandWindow, check_session_id
from amusd.serving.engine_thread import EngineThread
from amusd.serving.hosting import opened_session
from amusd.v1 import draft_pb2, draft_pb2_grpc
from draft_service.draft_worker import DraftOpening, DraftWorker


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
        self._max_wait_seconds = max_wait_seconds

    @faults.reported
    async def Propose(  # type: ignore[override]
        self, request_iterator: AsyncIterator[draft_pb2.ProposeRequest], context: faults.Context
    ) -> None:
        """See the protocol."""
        with self._observer.request(context) as watch:
            first = await anext(request_iterator, None)
            if first is None or first.WhichOneof("step") != "open":
                raise InvalidInputError("the first request of a Propose stream is an open")
            opening = _opening(first.open)
            outbox: Outbox[Proposal] = Outbox(MAX_MESSAGES_WAITING)

            async def write(proposal: Proposal) -> None:
                watch.proposed(proposal)
                await context.write(codec.proposal_to_proto(proposal))

            async with opened_session(
                self._engine,
                lambda worker: worker.open(opening, outbox.put),
                lambda worker: worker.close(opening.session_id),
                lambda worker: worker.give_up(opening.session_id),
                self._max_wait_seconds,
            ):
                watch.opened(opening.session_id, len(opening.tokens))
                await until_first_ends(
                    self._receive(request_iterator, opening.session_id), outbox.drain(write)
                )

    @faults.reported
    async def Rollback(
        self, request: draft_pb2.RollbackRequest, context: faults.Context
    ) -> draft_pb2.RollbackResponse:
        """See the protocol."""
        if request.verified_position < 1:
            raise InvalidInputError("verified_position is 0: the corrected token counts too")
        rollback = Rollback(
            request.epoch,
            request.verified_position,
            request.corrected_token_id,
            request.lookahead,
        )
        num_dropped = await asyncio.wrap_future(
            self._engine.submit(lambda worker: worker.rollback(request.session_id, rollback))
        )
        self._observer.rolled_back(request.session_id, rollback)
        return draft_pb2.RollbackResponse(num_dropped=num_dropped)

    @faults.reported
    async def GetDraftInfo(
        self, request: draft_pb2.GetDraftInfoRequest, context: faults.Context
    ) -> draft_pb2.GetDraftInfoResponse:
        """See the protocol."""
        return await asyncio.wrap_future(self._engine.submit(_info))

    async def _receive(
        self, requests: AsyncIterator[draft_pb2.ProposeRequest], session_id: str
    ) -> None:
        """Carry advances to the engine thread until the client closes."""
        window = CommandWindow()
        async for request in requests:
            match request.WhichOneof("step"):
                case "advance":
                    step = request.advance
                    advance = Advance(
                        step.epoch, step.position, tuple(step.token_ids), step.lookahead
                    )
                    command = partial(DraftWorker.advance, session_id=session_id, advance=advance)
                    await window.passed(self._engine.submit(command))
                case "close":
                    return
                case "open":
                    raise InvalidInputError(
                        "this stream is open already: open a second session on a second stream"
                    )
                case _:
                    raise InvalidInputError("a request without a step: set advance or close")


def _opening(request: draft_pb2.ProposeOpen) -> DraftOpening:
    check_session_id(request.session_id)
    return DraftOpening(
        session_id=request.session_id,
        tokens=list(request.token_ids),
        limits=DraftLimits(
            lookahead=request.lookahead,
            max_position=request.max_position,
            tokens_per_proposal=request.tokens_per_proposal or 1,
        ),
        epoch=request.epoch,
        vocabulary_fingerprint=request.vocabulary_fingerprint,
    )


def _info(worker: DraftWorker) -> draft_pb2.GetDraftInfoResponse:
    drafter = worker.drafter
    return draft_pb2.GetDraftInfoResponse(
        model=codec.model_to_proto(drafter.description),
        limits=codec.limits_to_proto(worker.limits),
        num_sessions=worker.num_sessions,
        num_waiting=worker.num_waiting,
        cache=codec.usage_to_proto(drafter.usage),
        sources=[codec.source_to_proto(one) for one in DraftSource if one in drafter.sources],
    )
