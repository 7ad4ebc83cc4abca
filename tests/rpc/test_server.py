"""What health says over a service's life, in one process."""

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from amusd.protocol.errors import AmusdError
from amusd.rpc.server import LIVE, Listen, ServiceShell
from amusd.serving.engine_thread import EngineThread
from amusd.serving.hosting import run_engine_service

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE = "amusd.v1.VerifyService"


class FailingWorker:
    """Fails at its first batch."""

    def __init__(self) -> None:
        self.flush: Callable[[], None] = lambda: None

    def step(self) -> bool:
        raise RuntimeError("out of memory")

    def recover(self, error: Exception) -> None:
        raise error


def address_of(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.split()[-1]


async def statuses(health: health_pb2_grpc.HealthStub, name: str) -> AsyncIterator[int]:
    """Yield what health says of ``name``, as it changes."""
    call = health.Watch(health_pb2.HealthCheckRequest(service=name), timeout=10)
    async for answer in call:
        yield int(answer.status)


async def test_live_comes_with_the_port_and_readiness_with_the_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shell = ServiceShell(Listen(), SERVICE, "Verify")
    await shell.start()
    async with grpc.aio.insecure_channel(address_of(capsys)) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        live, ready, any_name = (statuses(health, name) for name in (LIVE, SERVICE, ""))
        assert [await anext(one) for one in (live, ready, any_name)] == [
            SERVING,
            NOT_SERVING,
            NOT_SERVING,
        ]
        await shell.set_ready()
        assert [await anext(one) for one in (ready, any_name)] == [SERVING, SERVING]
        stopped = asyncio.ensure_future(shell.stop())
        assert [await anext(one) for one in (ready, any_name)] == [NOT_SERVING, NOT_SERVING]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(live)  # it never said anything but SERVING
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await stopped


async def test_an_engine_that_fails_is_not_alive(capsys: pytest.CaptureFixture[str]) -> None:
    shell = ServiceShell(Listen(grace_seconds=60), SERVICE, "Verify")
    listening, go = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def make() -> FailingWorker:
        loop.call_soon_threadsafe(listening.set)  # the engine thread starts after the server
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result()
        return FailingWorker()

    thread = EngineThread("failing", make)
    service = asyncio.ensure_future(run_engine_service(shell, thread, lambda _: "it", False))
    await listening.wait()
    async with grpc.aio.insecure_channel(address_of(capsys)) as channel:
        live = statuses(health_pb2_grpc.HealthStub(channel), LIVE)
        assert await anext(live) == SERVING
        go.set()
        await asyncio.wrap_future(thread.ready)
        thread.submit(lambda _: None)
        assert await anext(live) == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError, match="engine of this replica failed"):
            await anext(live)
    with pytest.raises(AmusdError, match="the engine failed"):
        await service


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x02\xff\xff"])
async def test_bytes_that_are_no_message_are_an_invalid_argument(
    capsys: pytest.CaptureFixture[str], data: bytes
) -> None:
    shell = ServiceShell(Listen(), SERVICE, "Verify")
    await shell.start()
    async with grpc.aio.insecure_channel(address_of(capsys)) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check", bytes, bytes)
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch", bytes, bytes)
        for answer in (check(data, timeout=10), watch(data, timeout=10).read()):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await answer
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert ".proto" in str(caught.value.details())
    await shell.stop()
