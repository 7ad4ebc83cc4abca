"""The HTTP server: uvicorn on the sockets and with the signals of this project."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

_FIRST_REQUEST_SECONDS = 30.0
_KEEP_ALIVE_SECONDS = 30
_STOP_SECONDS = 2
_BACKLOG = 1024


class JoiningTransport:
    """A transport that sends the status of a stream and its first event in one packet.

    Sending costs more time than anything else in a request.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        """Write to ``transport``."""
        self._transport = transport
        self._held: bytes | None = None

    def hold_next(self) -> None:
        """Keep what is written next, and send it with what follows."""
        self._held = b""

    def write(self, data: bytes) -> None:
        """Send data, or keep it."""
        if self._held == b"":
            self._held = data
            return
        if self._held is not None:
            data, self._held = self._held + data, None
        self._transport.write(data)

    def close(self) -> None:
        """Send what is kept, and close."""
        if self._held:
            self._transport.write(self._held)
        self._held = None
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        """Return all else of the transport."""
        return getattr(self._transport, name)


class _Protocol(H11Protocol):
    """A connection that an application can abort, and that ends if it never sends a request."""

    _silence: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        joining = JoiningTransport(transport)
        super().connection_made(joining)  # type: ignore[arg-type]  # it has all attributes
        # asyncio does this only for sockets that name their protocol. Otherwise the first event
        # would wait 40 ms for the client to acknowledge the status.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.app_state = {**self.app_state, "transport": joining}
        self._silence = self.loop.call_later(_FIRST_REQUEST_SECONDS, self._end_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        self._silence.cancel()
        super().connection_lost(exc)

    def _end_if_silent(self) -> None:
        if self.cycle is None:
            self.transport.abort()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the gateway."""
        yield


class HttpServer:
    """Serves an application on sockets that are bound already."""

    def __init__(self, application: ASGIApp, bound: list[socket.socket]) -> None:
        """Serve ``application``; the server owns the sockets."""
        config = uvicorn.Config(
            application,
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
        self._server = _Server(config)
        self._bound = bound
        for one in bound:
            one.listen(_BACKLOG)  # connections wait until the server accepts them

    async def serve(self) -> None:
        """Serve until ``end`` is called; then close all connections."""
        await self._server.serve(self._bound)

    def end(self) -> None:
        """Close idle connections, and the others when their answer ends, within 2 s."""
        self._server.should_exit = True


def port_of(bound: list[socket.socket]) -> int:
    """Return the port of a listener."""
    name: Any = bound[0].getsockname()
    return int(name[1])
