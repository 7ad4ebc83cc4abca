"""A session that fails while its first message is written: its status arrives all the same."""

import asyncio
from collections.abc import AsyncIterator
from typing import cast

import grpc
import grpc.aio
import pytest

from amusd.observe.observer import Observer
from amusd.rpc import faults
from amusd.rpc.stream_limits import MAX_MESSAGES_WAITING
from amusd.serving.engine_thread import EngineThread
from amusd.serving.session_stream import SessionStreams, StreamShape
from amusd.v1 import draft_pb2 as pb
from amusd.v1 import draft_pb2_grpc
from tests.serving.fake_serving import FakeOpening
from tests.serving.test_session_stream import OPEN, LoggingWorker


class FloodedContext:
    """The context of a call that is flooded with messages while the first one is written."""

    def __init__(self, context: faults.Context, thread: EngineThread[LoggingWorker]) -> None:
        self._context = context
        self._thread = thread
        self._is_first = True

    def __getattr__(self, name: str) -> object:
        return getattr(self._context, name)

    async def write(self, response: pb.ProposeResponse) -> None:
        writing = asyncio.ensure_future(self._context.write(response))
        if self._is_first:
            self._is_first = False
            await asyncio.sleep(0)  # gRPC has the message, and does not say yet that it is sent
            postbox, send = self._thread.postbox, self._thread.ready.result().sends["a"]
            for number in range(MAX_MESSAGES_WAITING + 2):
                send(number)
            postbox.flush()
        try:
            await writing
        finally:
            writing.cancel()


class Servicer(draft_pb2_grpc.DraftServiceServicer):
    """Serves Propose on an engine thread without a model."""

    def __init__(self, thread: EngineThread[LoggingWorker]) -> None:
        shape: StreamShape[int, int] = StreamShape(
            rpc="Propose",
            step="advance",
            opening=lambda request: FakeOpening(request.session_id, list(request.token_ids)),
            event=lambda advance: int(advance.position),
            response=lambda number: pb.ProposeResponse(proposal=pb.Proposal(position=number)),
            record=lambda watch, number: None,
        )
        self._thread = thread
        self._streams = SessionStreams(shape, thread, 3600.0, Observer("draft"))

    @faults.reported
    async def Propose(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[pb.ProposeRequest], context: faults.Context
    ) -> None:
        flooded = cast("faults.Context", FloodedContext(context, self._thread))
        await self._streams.serve(request_iterator, flooded)


async def test_an_overflow_during_the_first_write_ends_the_call_with_its_status() -> None:
    worker = LoggingWorker()
    thread = EngineThread("engine", lambda: worker)
    thread.start()
    thread.ready.result(10)
    thread.postbox.attach()
    servicer = Servicer(thread)  # type: ignore[abstract]
    server = grpc.aio.server()
    draft_pb2_grpc.add_DraftServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = draft_pb2_grpc.DraftServiceStub(channel).Propose(timeout=5)  # type: ignore[call-arg]
            await call.write(OPEN)
            await call.write(pb.ProposeRequest(advance=pb.ProposeAdvance(position=7)))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in call:
                    pass
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "read faster" in str(caught.value.details())
        await asyncio.wrap_future(thread.submit(lambda worker: None))  # behind the close
        assert worker.log == ["open a", "event 7", "close a"]
    finally:
        await server.stop(0)
        thread.stop(10)
