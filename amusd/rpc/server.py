"""The shell of every service: one port with health and reflection, and an orderly end.

Health answers for three names. The empty one and the service's full name say whether sessions are
let in: NOT_SERVING until the service says that it is ready, while it is suspended, and from the
first signal on. ``live`` says whether the process is worth keeping: SERVING while it loads, serves
and drains, and NOT_SERVING once it has failed, or cannot work for long.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from amusd.fleet.endpoint import Endpoint, parse_host
from amusd.protocol.errors import UnavailableError
from amusd.rpc.channel import SERVER_OPTIONS
from amusd.rpc.draining import Drain
from amusd.rpc.ending import Ending
from amusd.rpc.listening import check_free
from amusd.rpc.time_slices import shorten_time_slices
from amusd.rpc.tuning import freeze_garbage
from amusd.rpc.unreadable_requests import UnreadableRequests
from amusd.settings import check_bounds, setting

log = logging.getLogger(__name__)

LIVE = "live"
"""Name under which health says whether the process is worth keeping."""

_REFUSED = "the service is shutting down and takes no new session: use another replica"
_CUT_OFF = "the service is shutting down: this session was cut off {when}, try another replica"
_OTHER_PORT = "choose others with --host and --port"
_STOP_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Listen:
    """Where a service listens, and how it ends.

    A connection that reaches its maximum age is closed gracefully: open calls on it continue, and
    a new call makes the client connect again.
    """

    host: str = setting(
        "127.0.0.1",
        "Name or IP address to listen on, with or without brackets; :: or 0.0.0.0: all addresses, "
        "IPv6 and IPv4.",
        read=parse_host,
    )
    port: int = setting(0, "Port to listen on; 0: any free port.", at_least=0, at_most=65535)
    grace_seconds: float = setting(
        5.0, "Time for open sessions to finish after a signal.", at_least=0
    )
    max_connection_age_seconds: float = setting(
        0.0,
        "Age at which a client has to connect again, perhaps to another replica; 0: no limit.",
        at_least=0,
    )
    end_with_stdin: bool = setting(False, "End the service when its standard input closes.")

    def __post_init__(self) -> None:
        """Refuse values out of range; keep the host without brackets."""
        check_bounds(self)
        object.__setattr__(self, "host", parse_host(self.host))

    @property
    def endpoint(self) -> Endpoint:
        """Where the service listens."""
        return Endpoint(self.host, self.port)

    @property
    def server_options(self) -> list[tuple[str, Any]]:
        """Options of the gRPC server."""
        if not self.max_connection_age_seconds:
            return SERVER_OPTIONS
        age = int(1000 * self.max_connection_age_seconds)
        return [*SERVER_OPTIONS, ("grpc.max_connection_age_ms", age)]


class ServiceShell:
    """A gRPC server with one service of ours on it."""

    def __init__(self, listen: Listen, service: str, session_rpc: str) -> None:
        """Make the server.

        Health answers for ``service``, a full name; calls of its ``session_rpc`` are sessions.
        """
        shorten_time_slices()  # gRPC's threads inherit it
        self._drain = Drain(service, session_rpc)
        self.server = grpc.aio.server(
            options=listen.server_options, interceptors=(self._drain, UnreadableRequests())
        )
        self._listen = listen
        self._service = service
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._ending = Ending()
        self._failure = ""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        names = (service, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.server)

    async def start(self) -> None:
        """Listen, not serving yet, and say where on standard output.

        Raises:
            UnavailableError: the port is taken, or the host is not one of this machine.
        """
        endpoint = self._listen.endpoint
        # gRPC would be content with one free address of several.
        check_free(endpoint, _OTHER_PORT)
        await self._set_serving(False)
        await self.set_live(True)
        try:
            bound = self.server.add_insecure_port(str(endpoint))
        except RuntimeError:
            bound = 0
        if bound == 0:
            raise UnavailableError(f"cannot listen on {endpoint}; {_OTHER_PORT}")
        await self.server.start()
        print(f"listening on {Endpoint(endpoint.host, bound)}", flush=True)

    async def set_ready(self) -> None:
        """Tell health checks that the service serves, unless it is ending already."""
        freeze_garbage()
        if not self._ending.is_requested:
            await self._set_serving(True)

    @property
    def grace_seconds(self) -> float:
        """Time that open sessions have to finish after a signal."""
        return self._listen.grace_seconds

    async def suspend(self, reason: str) -> None:
        """Refuse new sessions with ``reason`` until ``resume``; health says NOT_SERVING."""
        if not self._ending.is_requested:
            self._drain.refuse(reason)
            await self._set_serving(False)

    async def resume(self) -> None:
        """Let sessions in again, unless the service is ending."""
        if not self._ending.is_requested:
            self._drain.refuse("")
            await self._set_serving(True)

    async def end_sessions(self, reason: str) -> None:
        """End all streams of the service with UNAVAILABLE and ``reason``; new ones may come."""
        await self._drain.end_sessions(reason)

    async def set_live(self, is_live: bool) -> None:
        """Say whether the process is worth keeping."""
        status = health_pb2.HealthCheckResponse
        await self._health.set(LIVE, status.SERVING if is_live else status.NOT_SERVING)

    def end(self) -> None:
        """Ask the service to end."""
        self._ending.request()

    async def wait_for_end(self) -> None:
        """Return when a signal or ``end`` asks the service to end."""
        await self._ending.wait()

    async def fail(self, why: str) -> None:
        """Say that the service cannot go on: it is not alive, and sessions end with ``why``."""
        self._failure = why
        await self.set_live(False)
        self._ending.request_at_once()

    async def stop(self) -> None:
        """Refuse new sessions, let the open ones end within their grace, and end."""
        await self._set_serving(False)
        self._drain.refuse(self._failure or _REFUSED)
        cut_off = await self._wait_for_sessions()
        await self._drain.end_all(self._failure or _CUT_OFF.format(when=cut_off))
        await self.server.stop(_STOP_SECONDS)

    async def _wait_for_sessions(self) -> str:
        """Wait until none is open, the grace is over or must not be waited for; return which."""
        grace = self._listen.grace_seconds
        if self._drain.num_sessions and not self._ending.is_at_once:
            log.info("%d sessions may end within %g s", self._drain.num_sessions, grace)
        waits = [
            asyncio.ensure_future(self._drain.wait_until_empty()),
            asyncio.ensure_future(self._ending.wait_at_once()),
        ]
        try:
            await asyncio.wait(waits, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return "by a second signal" if self._ending.is_at_once else f"after {grace:g} s"

    @contextlib.contextmanager
    def signals_handled(self, end_with_stdin: bool = False) -> Iterator[None]:
        """Let SIGINT and SIGTERM ask for the end; a second one cuts the grace short."""
        with self._ending.signals_handled(end_with_stdin):
            yield

    async def _set_serving(self, serving: bool) -> None:
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", self._service):
            await self._health.set(name, status)
