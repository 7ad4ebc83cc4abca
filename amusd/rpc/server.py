"""The shell of every service: one port with health and reflection, and an orderly end.

A service is NOT_SERVING until it says that it is ready, and again from the first signal on.
"""

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from amusd.core.errors import UnavailableError
from amusd.rpc.channel import SERVER_OPTIONS

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listen:
    """Where a service listens, and how long its open calls may take to end, in seconds."""

    host: str = "127.0.0.1"
    port: int = 0
    grace_seconds: float = 5.0


class ServiceShell:
    """A gRPC server with one service of ours on it."""

    def __init__(self, listen: Listen, service: str) -> None:
        """Make the server; ``service`` is the full name that health answers for."""
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        self._listen = listen
        self._service = service
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._end = asyncio.Event()
        self._signals = 0
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        names = (service, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.server)

    async def start(self) -> None:
        """Listen, not serving yet, and say where on standard output.

        Raises:
            UnavailableError: the port is taken, or the host is not one of this machine.
        """
        host, port = self._listen.host, self._listen.port
        await self._set_serving(False)
        try:
            bound = self.server.add_insecure_port(f"{host}:{port}")
        except RuntimeError:
            bound = 0
        if bound == 0:
            raise UnavailableError(
                f"cannot listen on {host}:{port}: the port is in use or the host is not this "
                "machine; choose others with --host and --port"
            )
        await self.server.start()
        print(f"listening on {host}:{bound}", flush=True)

    async def set_ready(self) -> None:
        """Tell health checks that the service serves, unless it is ending already."""
        if not self._end.is_set():
            await self._set_serving(True)

    def end(self) -> None:
        """Ask the service to end."""
        self._end.set()

    async def wait_for_end(self) -> None:
        """Return when a signal or ``end`` asks the service to end."""
        await self._end.wait()

    async def stop(self) -> None:
        """Refuse new calls, let the open ones end within their grace, and end."""
        await self._set_serving(False)
        grace = 0.0 if self._signals > 1 else self._listen.grace_seconds
        await self.server.stop(grace)

    @contextlib.contextmanager
    def signals_handled(self, end_with_stdin: bool = False) -> Iterator[None]:
        """Let SIGINT and SIGTERM ask for the end; a second one cuts the grace short."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        if end_with_stdin:
            watcher = threading.Thread(target=self._watch_stdin, args=(loop,), daemon=True)
            watcher.start()
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        self._signals += 1
        self._end.set()
        if self._signals > 1:
            # The first stop may be waiting out its grace: this one overtakes it.
            self._second_stop = asyncio.ensure_future(self.server.stop(0))

    def _watch_stdin(self, loop: asyncio.AbstractEventLoop) -> None:
        """End when whoever started the service closes its standard input, or dies."""
        # Not through sys.stdin: its lock, held here, would break the interpreter's shutdown.
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._end.set)

    async def _set_serving(self, serving: bool) -> None:
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", self._service):
            await self._health.set(name, status)
