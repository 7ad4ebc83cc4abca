"""Streams that a service ends itself, and streams that it leaves alone."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from amusd.rpc.server import Listen, ServiceShell
from amusd.v1 import draft_pb2_grpc

SERVICE = "amusd.v1.DraftService"
TIMEOUT_SECONDS = 30.0


class SilentDraft(draft_pb2_grpc.DraftServiceServicer):
    """Never answers."""

    def __init__(self) -> None:
        self.num_open = 0

    async def _wait(self, requests: Any, context: Any) -> None:
        self.num_open += 1
        try:
            await asyncio.sleep(TIMEOUT_SECONDS)
        finally:
            self.num_open -= 1

    Propose = Rollback = GetDraftInfo = _wait  # type: ignore[assignment]


async def none() -> AsyncIterator[Any]:
    await asyncio.sleep(TIMEOUT_SECONDS)
    yield


async def test_sessions_and_rollbacks_end_with_a_reason_and_new_ones_may_come(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shell = ServiceShell(Listen(grace_seconds=0), SERVICE, "Propose")
    draft = SilentDraft()
    draft_pb2_grpc.add_DraftServiceServicer_to_server(draft, shell.server)
    await shell.start()
    await shell.set_ready()

    async def until_open(num: int) -> None:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while draft.num_open < num:  # noqa: ASYNC110  # nothing signals it
                await asyncio.sleep(0.001)

    address = capsys.readouterr().out.split()[-1]
    async with grpc.aio.insecure_channel(address) as channel:
        stub = draft_pb2_grpc.DraftServiceStub(channel)
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        health = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=TIMEOUT_SECONDS)
        watch = aiter(health)
        assert (await anext(watch)).status == health_pb2.HealthCheckResponse.SERVING
        calls: list[grpc.aio.Call] = [stub.Propose(none()), stub.Rollback(none())]
        await until_open(2)
        await shell.suspend("the engine hangs")
        await shell.end_sessions("the engine hangs")
        for call in calls:
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
            assert await call.details() == "the engine hangs"
        assert (await anext(watch)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        refused = stub.Propose(none())
        assert await refused.details() == "the engine hangs"
        await shell.resume()
        assert (await anext(watch)).status == health_pb2.HealthCheckResponse.SERVING
        again = stub.Propose(none())
        await until_open(1)
        again.cancel()
        assert await again.code() is grpc.StatusCode.CANCELLED
        shell.end()
        await shell.suspend("too late")
        await shell.resume()
        await shell.stop()
        assert (await anext(watch)).status == health_pb2.HealthCheckResponse.NOT_SERVING
