"""Puts an orchestrator together: backends, tokenizer, server."""

import asyncio
import logging

from amusd.observe.observer import Observer
from amusd.rpc.server import ServiceShell
from amusd.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from orchestrator.backends import Backends
from orchestrator.servicer import OrchestratorServicer
from orchestrator.settings import OrchestratorSettings
from orchestrator.text import load_text_codec

log = logging.getLogger(__name__)


async def run_orchestrator(
    settings: OrchestratorSettings, observer: Observer, end_with_stdin: bool = False
) -> None:
    """Serve until a signal comes.

    Raises:
        AmusdError: the port is taken, the verify service does not come, or the models of the
            two services do not fit each other.
    """
    service = orchestrator_pb2.DESCRIPTOR.services_by_name["OrchestratorService"].full_name
    shell = ServiceShell(settings.listen, service)
    servicer = OrchestratorServicer(settings, observer)
    orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(servicer, shell.server)
    with shell.signals_handled(end_with_stdin):
        await shell.start()
        backends = Backends(settings.verify, settings.draft)
        ended = asyncio.ensure_future(shell.wait_for_end())
        connected = asyncio.ensure_future(_connect(settings, backends, servicer))
        try:
            await asyncio.wait([ended, connected], return_when=asyncio.FIRST_COMPLETED)
            if connected.done():
                connected.result()
                await shell.set_ready()
                await ended
        finally:
            for task in (ended, connected):
                task.cancel()
            await asyncio.gather(ended, connected, return_exceptions=True)
            await shell.stop()
            await backends.close()


async def _connect(
    settings: OrchestratorSettings, backends: Backends, servicer: OrchestratorServicer
) -> None:
    await backends.connect(settings.startup_timeout_seconds)
    tokenizer = settings.tokenizer or backends.verify_model.tokenizer
    text = await asyncio.to_thread(load_text_codec, tokenizer)
    servicer.open(backends, text)
    draft = backends.draft_model.summary() if backends.draft_model else "nothing"
    log.info("verifying with %s, drafting with %s", backends.verify_model.summary(), draft)
