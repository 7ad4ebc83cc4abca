"""``amusd serve``: one service, as a container runs it."""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any

import click

from amusd.cli.declared_options import HELP_NAMES, settings_command
from amusd.cli.service_settings import DRAFT, GATEWAY, ORCHESTRATOR, VERIFY
from amusd.observe.logging_setup import start_logging
from amusd.observe.metric_list import Role
from amusd.observe.observer import ObservationSettings, Observer, observing
from amusd.protocol.errors import InvalidInputError
from amusd.rpc.server import Listen
from amusd.serving.engine_settings import EngineServiceSettings
from draft_service.draft_main import run_draft_service
from draft_service.draft_settings import DraftServiceSettings
from gateway.gateway_settings import GatewaySettings
from orchestrator.orchestrator_main import run_orchestrator
from orchestrator.orchestrator_settings import OrchestratorSettings
from verify_service.verify_main import run_verify_service

Run = Callable[[Observer, bool], Coroutine[Any, Any, None]]
"""Runs a service until a signal comes, or standard input ends if the flag says so."""


def _serve_draft(settings: DraftServiceSettings) -> None:
    engine = settings.engine
    run = functools.partial(run_draft_service, settings)
    _run("draft", run, engine.listen, engine.observation)


def _serve_verify(settings: EngineServiceSettings) -> None:
    run = functools.partial(run_verify_service, settings)
    _run("verify", run, settings.listen, settings.observation)


def _serve_orchestrator(settings: OrchestratorSettings) -> None:
    run = functools.partial(run_orchestrator, settings)
    _run("orchestrator", run, settings.listen, settings.observation)


def _serve_gateway(settings: GatewaySettings) -> None:
    from gateway.gateway_main import run_gateway  # noqa: PLC0415  # other commands need no HTTP

    async def run(observer: Observer, end_with_stdin: bool) -> None:
        await run_gateway(settings, end_with_stdin)  # its metrics are on its own port

    _run("gateway", run, settings.listen, settings.observation)


_left_open: list[asyncio.Runner] = []
"""Event loops that are never closed: that would wait for threads that still download or resolve
names. The process ends without them."""


def _run(role: Role, run: Run, listen: Listen, observation: ObservationSettings) -> None:
    if listen.port and listen.port == observation.metrics_port:
        raise InvalidInputError(
            f"--port and --metrics-port are both {listen.port}: choose different ports"
        )
    start_logging(role, observation.log_level, observation.log_format)
    with observing(role, observation, listen.host) as observer:
        runner = asyncio.Runner()
        _left_open.append(runner)
        runner.run(run(observer, listen.end_with_stdin))


_DRAFT_HELP = "Run the draft service: a small model that proposes tokens."
_VERIFY_HELP = "Run the verify service: the model that decides the output."
_ORCHESTRATOR_HELP = "Run the orchestrator: the service that clients call."
_GATEWAY_HELP = "Run the gateway: the OpenAI-compatible HTTP API in front of an orchestrator."

serve = click.Group(
    "serve",
    help="Run one service until SIGINT or SIGTERM.",
    no_args_is_help=True,
    context_settings=HELP_NAMES,
    commands=[
        settings_command("draft", _DRAFT_HELP, DRAFT, _serve_draft),
        settings_command("verify", _VERIFY_HELP, VERIFY, _serve_verify),
        settings_command("orchestrator", _ORCHESTRATOR_HELP, ORCHESTRATOR, _serve_orchestrator),
        settings_command("gateway", _GATEWAY_HELP, GATEWAY, _serve_gateway),
    ],
)
