"""Timelines of simulated sessions with simulated times."""

import dataclasses

from amusd.analysis.timeline import Timeline, TimelineRecorder
from amusd.protocol.events import Decision, DeviceTime, Proposal, Verdict
from tests.protocol.scenario import Schedule
from tests.protocol.simulation import Simulation

TICK_NANOS = 1_000_000
STARTED_UNIX_NANOS = 1_800_000_000_000_000_000


def timeline_of(run: Simulation, schedule: Schedule) -> Timeline:
    """Run a simulation to its end and return its timeline; each move takes one tick.

    A step or pass takes less than half a tick and ends before its message is sent, so times are
    causal.
    """
    recorder = TimelineRecorder(STARTED_UNIX_NANOS, max_branches=run.setup.max_branches)
    core = run.orchestrator
    carry_out, on_verdict, on_proposal = core._carry_out, core.on_verdict, core.on_proposal
    taken_up: list[Proposal | Verdict] = []

    def now() -> int:
        return STARTED_UNIX_NANOS + run.num_moves * TICK_NANOS

    def recorded(decision: Decision) -> None:
        recorder.decided(taken_up.pop() if taken_up else None, decision, now())
        carry_out(decision)

    def take_verdict(verdict: Verdict) -> None:
        taken_up[:] = [verdict]
        on_verdict(verdict)

    def take_proposal(proposal: Proposal) -> None:
        taken_up[:] = [proposal]
        on_proposal(proposal)

    core.__dict__.update(_carry_out=recorded, on_verdict=take_verdict, on_proposal=take_proposal)
    for _ in run.steps(schedule):
        _stamp(run, now())
    run.ledger.close()
    return recorder.timeline()


def _stamp(run: Simulation, unix_nanos: int) -> None:
    """Add device times in the tick that ends now to the messages that were just sent."""
    worked = DeviceTime(unix_nanos - TICK_NANOS // 2, 0.4e-9 * TICK_NANOS)
    if run.draft is not None and run.draft.sent and not run.draft.sent[-1].steps:
        steps = (worked,)
        run.draft.sent[-1] = dataclasses.replace(run.draft.sent[-1], steps=steps)
    if run.verify.sent and not run.verify.sent[-1].passes:
        run.verify.sent[-1] = dataclasses.replace(run.verify.sent[-1], passes=(worked,))
