"""A TCP proxy that delays bytes, as a longer network path does. It drops and reorders nothing.

It uses threads that sleep: an event loop wakes only to the millisecond.
"""

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Iterator

from amusd.fleet.endpoint import parse_endpoint

_CHUNK = 65_536
_MAX_CHUNKS = 1024  # on their way in one direction of a connection; then the sender waits
_JOIN_SECONDS = 5.0


class DelayingProxy:
    """Listens on a free port and forwards each connection to ``target``.

    Each connection has two pumps of two threads. All end when their connection or the proxy does.
    """

    def __init__(self, target: str, delay_seconds: float) -> None:
        """Forward to ``host:port``; each byte takes ``delay_seconds`` longer, either way."""
        self._target = parse_endpoint(target)
        self._delay_seconds = delay_seconds
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        """End all connections and wait for the threads."""
        _shut(self._listener)
        self._threads[0].join(_JOIN_SECONDS)  # it adds no more sockets and threads
        for one in self._sockets:
            _shut(one)
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._sockets.append(client)
                try:
                    server = socket.create_connection((self._target.host, self._target.port))
                except OSError:
                    _shut(client)
                    continue
                self._sockets.append(server)
                self._pump(client, server)
                self._pump(server, client)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        """Start the two threads that carry bytes from ``source`` to ``sink``."""
        sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        chunks: queue.Queue[tuple[float, bytes]] = queue.Queue(_MAX_CHUNKS)
        for work in (self._read, self._write):
            end = source if work == self._read else sink
            thread = threading.Thread(target=work, args=(end, chunks), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _read(self, source: socket.socket, chunks: "queue.Queue[tuple[float, bytes]]") -> None:
        data = b"?"
        while data:
            try:
                data = source.recv(_CHUNK)
            except OSError:
                data = b""  # as at the end of the stream
            chunks.put((time.monotonic() + self._delay_seconds, data))

    def _write(self, sink: socket.socket, chunks: "queue.Queue[tuple[float, bytes]]") -> None:
        is_open = True
        while True:
            due, data = chunks.get()
            if not data:
                break
            time.sleep(max(0.0, due - time.monotonic()))
            if is_open:
                try:
                    sink.sendall(data)
                except OSError:
                    is_open = False  # what still comes is dropped
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def _shut(one: socket.socket) -> None:
    """Close a socket; threads that wait for it go on."""
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()


@contextlib.contextmanager
def delaying_proxy(target: str, delay_seconds: float) -> Iterator[str]:
    """Yield the address at which ``target`` is reached with the delay."""
    proxy = DelayingProxy(target, delay_seconds)
    try:
        yield proxy.address
    finally:
        proxy.close()
