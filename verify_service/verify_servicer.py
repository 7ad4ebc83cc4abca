"""The gRPC face of the verify service: only awaits and translates, never verifies."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial

from amusd.observe.observer import Observer
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.events import Forward, Verdict
from amusd.rpc import codec, faults
from amusd.rpc.outbox import Outbox, until_first_ends
from amusd.rpc.stream_limits import MAX_MESSAGES_WAITING, CommandWindow, check_session_id
from amusd.serving.engine_thread import EngineThread
from amusd.serving.hosting import opened_session
from amusd.v1 import verify_pb2, verify_pb2_grpc
from verify_service.verify_worker import VerifyOpening, VerifyWorker


class VerifyServicer(verify_pb2_grpc.VerifyServiceServicer):
    """Opens sessions on the engine thread and carries messages to and from it."""

    def __init__(
        self, engine: EngineThread[VerifyWorker], max_wait_seconds: float, observer: Observer
    ) -> None:
        """Serve the worker of ``engine``, once it is ready.

        A session waits for memory for at most ``max_wait_seconds``.
        """
        self._observer = observer
        self._engine = engine
        self._max_wait_seconds = max_wait_seconds

    @faults.reported
    async def Verify(  # type: ignore[override]
        self, request_iterator: AsyncIterator[verify_pb2.VerifyRequest], context: faults.Context
    ) -> None:
        """See the protocol."""
        with self._observer.request(context) as watch:
            first = await anext(request_iterator, None)
            if first is None or first.WhichOneof("step") != "open":
                raise InvalidInputError("the first request of a Verify stream is an open")
            opening = _opening(first.open)
            outbox: Outbox[Verdict] = Outbox(MAX_MESSAGES_WAITING)

            async def write(verdict: Verdict) -> None:
                watch.verified(verdict)
                await context.write(codec.verdict_to_proto(verdict))

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
    async def GetVerifyInfo(
        self, request: verify_pb2.GetVerifyInfoRequest, context: faults.Context
    ) -> verify_pb2.GetVerifyInfoResponse:
        """See the protocol."""
        return await asyncio.wrap_future(self._engine.submit(_info))

    async def _receive(
        self, requests: AsyncIterator[verify_pb2.VerifyRequest], session_id: str
    ) -> None:
        """Carry proposals to the engine thread until the client closes."""
        window = CommandWindow()
        async for request in requests:
            match request.WhichOneof("step"):
                case "proposals":
                    step = request.proposals
                    proposals = Forward(
                        step.epoch, step.position, tuple(step.token_ids), step.max_checked
                    )
                    command = partial(
                        VerifyWorker.offer, session_id=session_id, proposals=proposals
                    )
                    await window.passed(self._engine.submit(command))
                case "close":
                    return
                case "open":
                    raise InvalidInputError(
                        "this stream is open already: open a second session on a second stream"
                    )
                case _:
                    raise InvalidInputError("a request without a step: set proposals or close")


def _opening(request: verify_pb2.VerifyOpen) -> VerifyOpening:
    check_session_id(request.session_id)
    return VerifyOpening(
        session_id=request.session_id,
        tokens=list(request.token_ids),
        max_position=request.max_position,
        epoch=request.epoch,
        vocabulary_fingerprint=request.vocabulary_fingerprint,
    )


def _info(worker: VerifyWorker) -> verify_pb2.GetVerifyInfoResponse:
    return verify_pb2.GetVerifyInfoResponse(
        model=codec.model_to_proto(worker.engine.description),
        limits=codec.limits_to_proto(worker.limits),
        num_sessions=worker.num_sessions,
        num_waiting=worker.num_waiting,
        cache=codec.usage_to_proto(worker.engine.usage),
    )
