"""Pools that run for the time of a test, and generations on them."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from amusd.observe.observer import Observer, RequestWatch
from amusd.protocol.finish import FinishRule
from amusd.protocol.strategy import Strategy
from orchestrator.addresses import Resolver
from orchestrator.backends import Backends
from orchestrator.emission import Emission
from orchestrator.orchestrator_settings import OrchestratorSettings
from orchestrator.session import Session
from orchestrator.session_plan import Outcome, SessionPlan
from tests.orchestrator.replicas import written

Serve = Callable[..., Awaitable[str]]
"""Starts a service, and returns its address."""


@asynccontextmanager
async def running(
    verify: str,
    draft: str = "",
    names: Resolver | None = None,
    replica_timeout_seconds: float = 10.0,
) -> AsyncIterator[Backends]:
    """Run the pools of both roles; ``names`` resolves host names."""
    settings = OrchestratorSettings(
        verify=verify,
        draft=draft,
        default_strategy=Strategy.AMUSD if draft else Strategy.AUTOREGRESSIVE,
        resolve_interval_seconds=0.02,
        replica_timeout_seconds=replica_timeout_seconds,
    )
    backends = Backends(settings, names)
    task = asyncio.create_task(backends.run())
    try:
        yield backends
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def generate(
    backends: Backends,
    strategy: Strategy,
    draft_timeout_seconds: float = 5.0,
    verify_timeout_seconds: float = 10.0,
    replica_timeout_seconds: float = 10.0,
) -> Outcome:
    """Write 12 tokens; all that come have to be the model's own, and no token may be missing."""
    plan = SessionPlan(
        uuid.uuid4().hex,
        (1, 2),
        strategy,
        4,
        FinishRule(12, frozenset()),
        verify_timeout_seconds,
        draft_timeout_seconds,
        replica_timeout_seconds,
    )
    outcome, emissions = await run_session(backends, plan)
    assert [token for one in emissions for token in one.tokens] == written([1, 2], 12)
    return outcome


async def run_session(backends: Backends, plan: SessionPlan) -> tuple[Outcome, list[Emission]]:
    """Run the session of a plan; return how it ended, and all that it emitted."""
    emissions: list[Emission] = []
    watch = RequestWatch(Observer("orchestrator"))
    outcome = await Session(backends, plan, emissions.append, watch).run()
    return outcome, emissions
