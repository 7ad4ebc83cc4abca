"""Puts a verify service together: model, worker, server."""

from amusd.engine.loading.model_loading import load_model
from amusd.observe.engine_state import EngineState, watch_engine
from amusd.observe.observer import Observer
from amusd.rpc.server import ServiceShell
from amusd.serving.engine_health import EngineHealth
from amusd.serving.engine_settings import EngineServiceSettings
from amusd.serving.engine_thread import EngineThread
from amusd.serving.hosting import run_engine_service
from amusd.v1 import verify_pb2, verify_pb2_grpc
from verify_service.verify_servicer import VerifyServicer
from verify_service.verifying import VerifyWorker


def make_worker(
    settings: EngineServiceSettings, observer: Observer, health: EngineHealth
) -> VerifyWorker:
    """Return the worker of a verify service; for its engine thread."""
    engine = load_model(settings.model, "verify", settings.device, settings.engine_options)
    worker = VerifyWorker(
        engine,
        settings.limits(engine.description),
        settings.prefill_budget,
        settings.options.reuse_prefixes,
        observer.on_pass,
        health,
    )
    worker.warm_up()
    return worker


async def run_verify_service(
    settings: EngineServiceSettings, observer: Observer, end_with_stdin: bool = False
) -> None:
    """Serve until a signal comes."""
    service = verify_pb2.DESCRIPTOR.services_by_name["VerifyService"].full_name
    shell = ServiceShell(settings.listen, service, "Verify")
    health = EngineHealth(settings.health, observer.on_failed_batch)
    thread = EngineThread("verify-engine", lambda: make_worker(settings, observer, health))
    watch_engine(observer, thread, _state, settings.device.device, health)
    servicer = VerifyServicer(thread, settings.max_wait_seconds, observer)
    verify_pb2_grpc.add_VerifyServiceServicer_to_server(servicer, shell.server)
    await run_engine_service(
        shell, thread, lambda worker: worker.engine.description.summary(), end_with_stdin, health
    )


def _state(worker: VerifyWorker) -> EngineState:
    return EngineState(
        worker.num_sessions,
        worker.num_waiting,
        worker.engine.usage,
        worker.num_left_out,
        counters={"amusd_branch_starts_total": worker.num_branch_starts},
        gauges={"amusd_branches_held": worker.num_branches_held},
    )
