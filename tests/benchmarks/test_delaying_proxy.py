"""The delaying proxy keeps all bytes in order, and only delays them."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from benchmarks.delaying_proxy import delaying_proxy

DELAY_SECONDS = 0.02


@pytest.fixture(name="echo")
def _echo() -> Iterator[str]:
    """Run a server that sends back what it gets, up to the end of the stream."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            while data := connection.recv(65536):
                connection.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join(10)
        assert not thread.is_alive()


def connect(address: str) -> socket.socket:
    host, port = address.split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def send_all(client: socket.socket, data: bytes) -> None:
    client.sendall(data)
    client.shutdown(socket.SHUT_WR)


def test_bytes_come_back_in_order_after_both_delays(echo: str) -> None:
    sent = bytes(range(256)) * 4096
    with delaying_proxy(echo, DELAY_SECONDS) as address, connect(address) as client:
        started = time.monotonic()
        sender = threading.Thread(target=send_all, args=(client, sent))
        sender.start()
        first = client.recv(1)
        waited = time.monotonic() - started
        received = bytearray(first)
        while data := client.recv(65536):
            received += data
        sender.join()
    assert bytes(received) == sent
    assert waited >= 2 * DELAY_SECONDS


def test_delays_of_chunks_overlap(echo: str) -> None:
    """Ten messages that follow each other closely take one delay, not ten."""
    with delaying_proxy(echo, 0.1) as address, connect(address) as client:
        started = time.monotonic()
        for _ in range(10):
            client.sendall(b"x")
            time.sleep(0.002)
        received = b""
        while len(received) < 10:
            received += client.recv(10)
        waited = time.monotonic() - started
    assert 0.2 <= waited < 1.0


def test_closing_the_proxy_ends_its_connections(echo: str) -> None:
    before = threading.active_count()
    with delaying_proxy(echo, 0.0) as address:
        client = connect(address)
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    assert client.recv(1) == b""
    client.close()
    assert threading.active_count() <= before
