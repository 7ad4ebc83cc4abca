"""Listeners on every spelling of a host, and ports that are taken."""

import socket
from collections.abc import Iterator

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from amusd.fleet.endpoint import Endpoint
from amusd.protocol.errors import UnavailableError
from amusd.rpc.channel import open_channel
from amusd.rpc.listening import bind_all, check_free
from amusd.rpc.server import LIVE, Listen, ServiceShell

SERVICE = "amusd.v1.VerifyService"
HOSTS = ["127.0.0.1", "localhost", "::1", "[::1]", "::", "[::]", "0.0.0.0"]


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as made:
            made.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of 127.0.0.1 alone that another program listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


@needs_ipv6
@pytest.mark.parametrize("host", HOSTS)
async def test_a_service_listens_on_a_host_in_any_spelling_and_says_where(
    host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = ServiceShell(Listen(host=host), SERVICE, "Verify")
    await shell.start()
    address = capsys.readouterr().out.split()[-1]
    dialled = [address]
    if host in ("localhost", "::", "[::]", "0.0.0.0"):
        port = address.rpartition(":")[2]
        dialled += [f"127.0.0.1:{port}", f"[::1]:{port}", f"ipv6:[::1]:{port}"]
    for one in dialled:
        async with open_channel(one) as channel:
            request = health_pb2.HealthCheckRequest(service=LIVE)
            answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
    await shell.stop()


@needs_ipv6
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::", "0.0.0.0"])
async def test_a_port_that_one_address_of_the_host_has_taken_is_found(
    host: str, taken: int
) -> None:
    with pytest.raises(UnavailableError, match=rf":{taken}: the port is in use; .*--port"):
        await ServiceShell(Listen(host=host, port=taken), SERVICE, "Verify").start()


@pytest.mark.parametrize("host", ["192.0.2.77", "2001:db8::7", "no-such-host.invalid"])
def test_a_host_of_another_machine_is_found(host: str) -> None:
    with pytest.raises(UnavailableError, match="not this machine; choose"):
        check_free(Endpoint(host, 0), "choose")


def test_the_check_leaves_the_port_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
    check_free(Endpoint("127.0.0.1", port), "")
    for bound in bind_all(Endpoint("127.0.0.1", port)):
        bound.close()


def test_a_family_that_the_machine_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    make = socket.socket

    def without_ipv6(family: int, kind: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return make(family, kind)

    monkeypatch.setattr(socket, "socket", without_ipv6)
    (bound,) = bind_all(Endpoint("::", 0))
    assert bound.family == socket.AF_INET
    bound.close()
    with pytest.raises(OSError, match="not supported"):
        bind_all(Endpoint("::1", 0))
