"""Channels leave the proxies of the environment alone, unless they are told to use them."""

import asyncio

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from amusd.client import Client
from amusd.protocol.errors import InvalidInputError
from amusd.rpc.channel import open_channel
from amusd.rpc.server import LIVE, Listen, ServiceShell

VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY")
SERVICE = "amusd.v1.VerifyService"


@pytest.mark.parametrize("use_proxy", [False, True])
async def test_this_machine_is_dialled_directly_whatever_the_environment_names(
    use_proxy: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    shell = ServiceShell(Listen(), SERVICE, "Verify")
    await shell.start()
    address = capsys.readouterr().out.split()[-1]
    async with open_channel(address, use_proxy) as channel:
        request = health_pb2.HealthCheckRequest(service=LIVE)
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    await shell.stop()


async def dialled_through_proxy(use_proxy: bool, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return whether a call to another machine asks the proxy of the environment."""
    asked = asyncio.Event()

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (await reader.readline()).startswith(b"CONNECT 192.0.2.77:1"):
            asked.set()
        writer.close()

    server = await asyncio.start_server(proxy, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    async with server, open_channel("192.0.2.77:1", use_proxy) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=0.5
            )
    return asked.is_set()


async def test_another_machine_is_dialled_directly_by_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not await dialled_through_proxy(False, monkeypatch)


async def test_a_proxy_is_used_where_a_setting_asks_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert await dialled_through_proxy(True, monkeypatch)


@pytest.mark.parametrize("address", ["localhost", "http://localhost:50050", "::1:50050"])
def test_a_client_refuses_what_is_no_address(address: str) -> None:
    with pytest.raises(InvalidInputError, match="write host:port"):
        Client(address)
