"""Puts an orchestrator together: backends, tokenizer, server."""

import asyncio
import logging
import os
import sys

from amusd.observe.observer import Observer
from amusd.rpc.server import ServiceShell
from amusd.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from orchestrator.backends import Backends
from orchestrator.orchestrator_servicer import OrchestratorServicer
from orchestrator.orchestrator_settings import OrchestratorSettings
from orchestrator.text import load_text_codec
from orchestrator.tokenizer_check import check_tokenizer

log = logging.getLogger(__name__)

_SWITCH_INTERVAL_SECONDS = 0.0005


async def run_orchestrator(
    settings: OrchestratorSettings, observer: Observer, end_with_stdin: bool = False
) -> None:
    """Serve until a signal comes.

    Raises:
        AmusdError: the port is taken, no verify replica comes, the tokenizer or the draft replicas
            do not fit the verify model, or all verify replicas have become another model's.
    """
    # The event loop must get its turn soon while a chat template is rendered.
    sys.setswitchinterval(_SWITCH_INTERVAL_SECONDS)
    # A call tokenizes one text, so more threads of the library would only wait.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    service = orchestrator_pb2.DESCRIPTOR.services_by_name["OrchestratorService"].full_name
    shell = ServiceShell(settings.listen, service, "Generate")
    servicer = OrchestratorServicer(settings, observer)
    orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(servicer, shell.server)
    with shell.signals_handled(end_with_stdin):
        await shell.start()
        backends = Backends(settings)
        observer.count_replicas_by(backends.num_replicas)
        kept = asyncio.ensure_future(backends.run())
        outdated = asyncio.ensure_future(backends.until_outdated())
        ended = asyncio.ensure_future(shell.wait_for_end())
        ready = asyncio.ensure_future(_get_ready(settings, backends, servicer, shell))
        try:
            await _first_of(ended, kept, ready)
            if ready.done():
                await _first_of(ended, kept, outdated)
            else:
                log.info("ending before the orchestrator has served")
        finally:
            for task in (ended, ready, outdated):
                task.cancel()
            await shell.stop()  # open sessions go on, so the pools are kept till then
            kept.cancel()
            await asyncio.gather(ended, ready, outdated, kept, return_exceptions=True)
            servicer.close()


async def _first_of(*tasks: "asyncio.Future[None]") -> None:
    """Return when one of ``tasks`` ends, and raise what it raised."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


async def _get_ready(
    settings: OrchestratorSettings,
    backends: Backends,
    servicer: OrchestratorServicer,
    shell: ServiceShell,
) -> None:
    await backends.connect(settings.startup_timeout_seconds)
    tokenizer = settings.tokenizer or backends.verify_model.tokenizer
    text = await asyncio.to_thread(load_text_codec, tokenizer)
    await asyncio.to_thread(check_tokenizer, tokenizer, backends.verify_model)
    servicer.open(backends, text)
    await shell.set_ready()
    draft = backends.draft_model.summary() if backends.draft_model else "nothing"
    log.info("verifying with %s, drafting with %s", backends.verify_model.summary(), draft)
