"""Puts a draft service together: model, drafter, worker, server."""

from amusd.core.model import PROMPT_LOOKUP
from amusd.engine.loading import load_model
from amusd.engine.thread import EngineThread
from amusd.hosting import run_engine_service
from amusd.rpc.server import ServiceShell
from amusd.settings import EngineServiceSettings
from amusd.v1 import draft_pb2, draft_pb2_grpc
from draft_service.drafters import Drafter, ModelDrafter, PromptLookupDrafter
from draft_service.servicer import DraftServicer
from draft_service.worker import DraftWorker


def make_drafter(settings: EngineServiceSettings) -> Drafter:
    """Return the drafter that the settings name; it may take a while to load."""
    if settings.model == PROMPT_LOOKUP:
        return PromptLookupDrafter()
    engine = load_model(settings.model, "draft", settings.device)
    return ModelDrafter(engine, settings.prefill_tokens)


def make_worker(settings: EngineServiceSettings) -> DraftWorker:
    """Return the worker of a draft service; for its engine thread."""
    drafter = make_drafter(settings)
    return DraftWorker(drafter, settings.limits(drafter.description))


async def run_draft_service(settings: EngineServiceSettings, end_with_stdin: bool = False) -> None:
    """Serve until a signal comes."""
    service = draft_pb2.DESCRIPTOR.services_by_name["DraftService"].full_name
    shell = ServiceShell(settings.listen, service)
    thread = EngineThread("draft-engine", lambda: make_worker(settings))
    draft_pb2_grpc.add_DraftServiceServicer_to_server(DraftServicer(thread), shell.server)
    await run_engine_service(
        shell, thread, lambda worker: worker.drafter.description.summary(), end_with_stdin
    )
