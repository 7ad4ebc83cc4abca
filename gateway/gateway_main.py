"""Puts a gateway together: the client of the orchestrator, the routes, the server."""

import asyncio
import contextlib
import logging
import socket

from amusd.fleet.endpoint import Endpoint
from amusd.rpc.ending import Ending
from amusd.rpc.listening import bind_all, reported
from amusd.rpc.time_slices import shorten_time_slices
from amusd.rpc.tuning import freeze_garbage
from gateway.application import make_application
from gateway.gateway_metrics import GatewayMetrics
from gateway.gateway_settings import GatewaySettings
from gateway.http_admission import Admission
from gateway.http_server import HttpServer, port_of
from gateway.orchestrator_client import OrchestratorClient

log = logging.getLogger(__name__)

_REFUSED = "the gateway is shutting down and takes no new request: use another one"
_CUT_OFF = "the gateway is shutting down: this request was cut off {when}, try again"
_CUT_OFF_SECONDS = 2.0


async def run_gateway(settings: GatewaySettings, end_with_stdin: bool = False) -> None:
    """Serve until a signal comes.

    Raises:
        UnavailableError: the port is taken, or the host is not one of this machine.
        InvalidInputError: the address of the orchestrator is malformed.
    """
    shorten_time_slices()  # gRPC's threads inherit it
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its start and end are told here
    ending = Ending()
    orchestrator = OrchestratorClient(
        settings.orchestrator, settings.use_proxy, settings.request_timeout_seconds
    )
    admission = Admission(settings.max_requests)
    application = make_application(orchestrator, settings, admission, GatewayMetrics())
    bound = _bind(settings.listen.endpoint)
    server = HttpServer(application, bound)
    with ending.signals_handled(end_with_stdin):
        print(f"listening on {Endpoint(settings.listen.host, port_of(bound))}", flush=True)
        tasks = [
            asyncio.ensure_future(server.serve()),
            asyncio.ensure_future(orchestrator.keep_informed()),
            asyncio.ensure_future(ending.wait()),
        ]
        freeze_garbage()
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            await _drain(admission, ending, settings.listen.grace_seconds)
        finally:
            server.end()
            await asyncio.wait(tasks[:1], timeout=2 * _CUT_OFF_SECONDS)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await orchestrator.close()


def _bind(endpoint: Endpoint) -> list[socket.socket]:
    with reported(endpoint, "listen on", "choose others with --host and --port"):
        bound = bind_all(endpoint)
    if endpoint.port or len(bound) == 1:
        return bound
    port = port_of(bound)  # of the first address; the others have it, too
    for one in bound:
        one.close()
    return _bind(Endpoint(endpoint.host, port))


async def _drain(admission: Admission, ending: Ending, grace_seconds: float) -> None:
    """Refuse new requests, let the open ones end within the grace, and cut off the others."""
    admission.refuse(_REFUSED)
    if admission.num_open:
        log.info("%d requests may end within %g s", admission.num_open, grace_seconds)
    waits = [
        asyncio.ensure_future(admission.wait_until_empty()),
        asyncio.ensure_future(ending.wait_at_once()),
    ]
    try:
        await asyncio.wait(waits, timeout=grace_seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    when = "by a second signal" if ending.is_at_once else f"after {grace_seconds:g} s"
    admission.cut_off(_CUT_OFF.format(when=when))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_CUT_OFF_SECONDS):
            await admission.wait_until_empty()
