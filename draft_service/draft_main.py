"""Puts a draft service together: model, drafter, worker, server."""

from amusd.observe.engine_state import EngineState, watch_engine
from amusd.observe.observer import Observer
from amusd.rpc.server import ServiceShell
from amusd.serving.engine_health import EngineHealth
from amusd.serving.engine_thread import EngineThread
from amusd.serving.hosting import run_engine_service
from amusd.v1 import draft_pb2, draft_pb2_grpc
from draft_service.draft_servicer import DraftServicer
from draft_service.draft_settings import DraftServiceSettings
from draft_service.drafter_registry import make_drafter
from draft_service.drafting import DraftWorker


def make_worker(
    settings: DraftServiceSettings, observer: Observer, health: EngineHealth
) -> DraftWorker:
    """Return the worker of a draft service; for its engine thread."""
    drafter = make_drafter(settings)
    engine = settings.engine
    worker = DraftWorker(
        drafter,
        engine.limits(drafter.engine.description),
        engine.prefill_budget,
        engine.options.reuse_prefixes,
        observer.on_pass,
        health,
    )
    worker.warm_up()
    return worker


async def run_draft_service(
    settings: DraftServiceSettings, observer: Observer, end_with_stdin: bool = False
) -> None:
    """Serve until a signal comes."""
    service = draft_pb2.DESCRIPTOR.services_by_name["DraftService"].full_name
    shell = ServiceShell(settings.engine.listen, service, "Propose")
    health = EngineHealth(settings.engine.health, observer.on_failed_batch)
    thread = EngineThread("draft-engine", lambda: make_worker(settings, observer, health))
    watch_engine(observer, thread, _state, settings.engine.device.device, health)
    servicer = DraftServicer(thread, settings.engine.max_wait_seconds, observer)
    draft_pb2_grpc.add_DraftServiceServicer_to_server(servicer, shell.server)
    await run_engine_service(shell, thread, _describe, end_with_stdin, health)


def _describe(worker: DraftWorker) -> str:
    sources = " and ".join(sorted(source.value for source in worker.drafter.sources))
    return f"{worker.engine.description.summary()}, drafting by {sources}"


def _state(worker: DraftWorker) -> EngineState:
    counts = worker.branch_counts
    return EngineState(
        worker.num_sessions,
        worker.num_waiting,
        worker.engine.usage,
        worker.num_left_out,
        counters={
            "amusd_branches_prepared_total": counts.prepared,
            "amusd_branch_tokens_total": counts.tokens,
            "amusd_branch_rollback_hits_total": counts.rollback_hits,
        },
    )
