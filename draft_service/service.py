"""Puts a draft service together: model, drafter, worker, server."""

from amusd.core.errors import InvalidInputError
from amusd.core.model import ServiceLimits
from amusd.engine.loading import load_model
from amusd.engine.thread import EngineThread
from amusd.hosting import run_engine_service
from amusd.rpc.server import ServiceShell
from amusd.v1 import draft_pb2, draft_pb2_grpc
from draft_service.drafters import PROMPT_LOOKUP, Drafter, ModelDrafter, PromptLookupDrafter
from draft_service.servicer import DraftServicer
from draft_service.settings import DraftSettings
from draft_service.worker import DraftWorker


def make_drafter(settings: DraftSettings) -> Drafter:
    """Return the drafter that the settings name; it may take a while to load."""
    if settings.model == PROMPT_LOOKUP:
        return PromptLookupDrafter()
    engine = load_model(settings.model, "draft", settings.device)
    return ModelDrafter(engine, settings.prefill_tokens)


def make_worker(settings: DraftSettings) -> DraftWorker:
    """Return the worker of a draft service; for its engine thread."""
    drafter = make_drafter(settings)
    longest = drafter.description.context_length
    if settings.max_context > longest:
        raise InvalidInputError(
            f"max_context is {settings.max_context}: {drafter.description.name} takes {longest}"
        )
    limits = ServiceLimits(
        max_sessions=settings.max_sessions,
        max_context=settings.max_context or longest,
        max_lookahead=settings.max_lookahead,
    )
    return DraftWorker(drafter, limits)


async def run_draft_service(settings: DraftSettings, end_with_stdin: bool = False) -> None:
    """Serve until a signal comes."""
    service = draft_pb2.DESCRIPTOR.services_by_name["DraftService"].full_name
    shell = ServiceShell(settings.listen, service)
    thread = EngineThread("draft-engine", lambda: make_worker(settings))
    draft_pb2_grpc.add_DraftServiceServicer_to_server(DraftServicer(thread), shell.server)
    await run_engine_service(
        shell, thread, lambda worker: worker.drafter.description.summary(), end_with_stdin
    )
