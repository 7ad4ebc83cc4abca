"""The gRPC face of the verify service: only awaits and translates, never verifies."""

import asyncio
from collections.abc import AsyncIterator

from amusd.observe.observer import Observer
from amusd.protocol.events import Forward, Verdict
from amusd.rpc import codec, faults, model_codec
from amusd.rpc.sampling_codec import sequence_sampling_from_proto
from amusd.rpc.stream_limits import check_session_id
from amusd.serving.engine_thread import EngineThread
from amusd.serving.preparation import constraint_preparation
from amusd.serving.session_stream import SessionStreams, StreamShape
from amusd.v1 import verify_pb2, verify_pb2_grpc
from verify_service.verifying import VerifyOpening, VerifyWorker


class VerifyServicer(verify_pb2_grpc.VerifyServiceServicer):
    """Opens sessions on the engine thread and carries messages to and from it."""

    def __init__(
        self, engine: EngineThread[VerifyWorker], max_wait_seconds: float, observer: Observer
    ) -> None:
        """Serve the worker of ``engine``, once it is ready.

        A session waits for memory for at most ``max_wait_seconds``.
        """
        self._engine = engine
        self._streams = SessionStreams(_SHAPE, engine, max_wait_seconds, observer)

    @faults.reported
    async def Verify(  # type: ignore[override]
        self, request_iterator: AsyncIterator[verify_pb2.VerifyRequest], context: faults.Context
    ) -> None:
        """See the protocol."""
        await self._streams.serve(request_iterator, context)

    @faults.reported
    async def GetVerifyInfo(
        self, request: verify_pb2.GetVerifyInfoRequest, context: faults.Context
    ) -> verify_pb2.GetVerifyInfoResponse:
        """See the protocol."""
        return await asyncio.wrap_future(self._engine.submit(_info))


def _opening(request: verify_pb2.VerifyOpen) -> VerifyOpening:
    check_session_id(request.session_id)
    return VerifyOpening(
        session_id=request.session_id,
        tokens=list(request.token_ids),
        max_position=request.max_position,
        epoch=request.epoch,
        vocabulary_fingerprint=request.vocabulary_fingerprint,
        records_times=request.record_times,
        sampling=sequence_sampling_from_proto(request),
    )


_SHAPE: StreamShape[Forward, Verdict] = StreamShape(
    rpc="Verify",
    step="proposals",
    opening=_opening,
    event=codec.forward_from_proto,
    response=codec.verdict_to_proto,
    record=lambda watch, verdict: watch.verified(verdict),
    preparation=constraint_preparation,
)


def _info(worker: VerifyWorker) -> verify_pb2.GetVerifyInfoResponse:
    return verify_pb2.GetVerifyInfoResponse(
        model=model_codec.model_to_proto(worker.engine.description),
        limits=model_codec.limits_to_proto(worker.limits),
        num_sessions=worker.num_sessions,
        num_waiting=worker.num_waiting,
        cache=model_codec.usage_to_proto(worker.engine.usage),
    )
