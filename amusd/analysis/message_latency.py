"""Where the time of a rollback cycle goes: the latency of each message, found in a timeline.

A rollback cycle has four legs; between them the devices work:

    verify pass ──VERDICT──▶ orchestrator ──ROLLBACK──▶ draft step
    draft step ──PROPOSAL──▶ orchestrator ──FORWARD──▶ verify pass

Rules of this file
- It has no clock. The services and the orchestrator must share a host, because times of their
  clocks are subtracted from each other.
- A leg counts only the time that the message takes. The time that it waits for a running step or
  pass is not counted.
"""

import enum
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from amusd.analysis.timeline import Timeline
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.events import DeviceTime, Forward, Proposal, Rollback, Verdict


class Leg(enum.Enum):
    """One of the messages of a rollback cycle."""

    VERDICT = "end of a pass to verdict processed"
    ROLLBACK = "rollback decided to draft step started"
    PROPOSAL = "end of a draft step to proposal processed"
    FORWARD = "forward sent to pass started"


@dataclass(frozen=True, slots=True)
class Latency:
    """What one message took; ``in_cycle``: it is part of a cycle that a rollback began."""

    leg: Leg
    seconds: float
    in_cycle: bool


@dataclass(frozen=True, slots=True)
class _Busy:
    """Work of a device, in seconds since the request arrived."""

    started_seconds: float
    ended_seconds: float
    message: Proposal | Verdict


def message_latencies(timeline: Timeline) -> Iterator[Latency]:
    """Yield the latencies of all messages, leg by leg.

    In a cycle are: the verdict that calls for the rollback, the rollback, the first proposal of the
    new epoch, and the first forward in it. Messages of services that report no times are
    left out.
    """
    yield from _verdict_latencies(timeline)
    yield from _rollback_latencies(timeline)
    yield from _proposal_latencies(timeline)
    yield from _forward_latencies(timeline)


def message_counts(timeline: Timeline) -> Counter[str]:
    """Return how many messages of each kind the timeline holds, by the name of the kind."""
    return Counter(type(event.message).__name__.lower() for event in timeline.events)


def num_late_rollbacks(timeline: Timeline) -> int:
    """Return how many rollbacks arrived after the draft had started another step of the old epoch.

    The whole time of such a step counts as time of the rollback's message.
    """
    first = _first_proposals(timeline)
    steps = _works(timeline, Proposal)
    late = 0
    for event in timeline.events:
        if isinstance(event.message, Rollback) and event.message.epoch in first:
            proposal = first[event.message.epoch]
            own = _busy(timeline, _first_step(proposal), proposal)
            late += any(event.seconds <= s.started_seconds < own.started_seconds for s in steps)
    return late


def _verdict_latencies(timeline: Timeline) -> Iterator[Latency]:
    events = timeline.events
    # A verdict's rollback follows it directly.
    for event, following in zip(events, (*events[1:], None), strict=False):
        if isinstance(event.message, Verdict) and event.message.passes:
            ended = _busy(timeline, event.message.passes[-1], event.message).ended_seconds
            in_cycle = following is not None and isinstance(following.message, Rollback)
            yield Latency(Leg.VERDICT, event.seconds - ended, in_cycle)


def _rollback_latencies(timeline: Timeline) -> Iterator[Latency]:
    """Yield the time from each rollback to the first step of its epoch.

    The step that runs when the rollback is decided cannot be interrupted: time counts from its end.
    """
    first = _first_proposals(timeline)
    steps = _works(timeline, Proposal)
    for event in timeline.events:
        if not isinstance(event.message, Rollback) or event.message.epoch not in first:
            continue
        proposal = first[event.message.epoch]
        started = _busy(timeline, _first_step(proposal), proposal).started_seconds
        free = max(event.seconds, _end_of_running(steps, event.seconds))
        yield Latency(Leg.ROLLBACK, max(0.0, started - free), in_cycle=True)


def _proposal_latencies(timeline: Timeline) -> Iterator[Latency]:
    first = _first_proposals(timeline)
    rolled_back = _rolled_back_epochs(timeline)
    for event in timeline.events:
        proposal = event.message
        if (
            isinstance(proposal, Proposal)
            and proposal.steps
            and proposal.source is DraftSource.MODEL
        ):
            ended = _busy(timeline, proposal.steps[-1], proposal).ended_seconds
            in_cycle = proposal is first[proposal.epoch] and proposal.epoch in rolled_back
            yield Latency(Leg.PROPOSAL, event.seconds - ended, in_cycle)


def _forward_latencies(timeline: Timeline) -> Iterator[Latency]:
    """Yield the time from a forward to the pass that it starts, if the device was idle.

    A forward without tokens starts a pass without proposals.
    """
    passes = _works(timeline, Verdict)
    waiting = _rolled_back_epochs(timeline)  # for their first forward
    for event in timeline.events:
        if not isinstance(event.message, Forward):
            continue
        in_cycle = event.message.epoch in waiting
        waiting.discard(event.message.epoch)
        checked_by = _next_pass(passes, event.seconds)
        if checked_by is not None and _checks(checked_by.message, event.message):
            seconds = checked_by.started_seconds - event.seconds
            yield Latency(Leg.FORWARD, seconds, in_cycle)


def _next_pass(passes: list[_Busy], seconds: float) -> _Busy | None:
    """Return the first pass that starts at ``seconds`` or later; None if one runs then."""
    index = bisect_left(passes, seconds, key=lambda one: one.started_seconds)
    if index == len(passes) or (index and passes[index - 1].ended_seconds > seconds):
        return None
    return passes[index]


def _checks(verdict: Proposal | Verdict, forward: Forward) -> bool:
    """Whether ``forward`` started a verdict's pass: over its first token, or without proposals."""
    if not isinstance(verdict, Verdict):
        return False
    if not forward.tokens:
        return verdict.position == forward.position
    if verdict.epoch != forward.epoch:
        return False
    return verdict.position <= forward.position < verdict.position + verdict.num_checked


def _end_of_running(steps: list[_Busy], seconds: float) -> float:
    """Return when the step ends that runs at ``seconds``; 0 if none does."""
    index = bisect_left(steps, seconds, key=lambda one: one.started_seconds)
    return steps[index - 1].ended_seconds if index else 0.0


def _first_proposals(timeline: Timeline) -> dict[int, Proposal]:
    """Return the first proposal of each epoch that the model wrote, and that reports its steps."""
    first: dict[int, Proposal] = {}
    for event in timeline.events:
        message = event.message
        if isinstance(message, Proposal) and message.steps and message.source is DraftSource.MODEL:
            first.setdefault(message.epoch, message)
    return first


def _first_step(proposal: Proposal) -> DeviceTime:
    """Return the step that drafted the model's first token; the steps before it were dropped."""
    num_own = max(1, len(proposal.tokens))
    return proposal.steps[-min(num_own, len(proposal.steps))]


def _rolled_back_epochs(timeline: Timeline) -> set[int]:
    """Return the epochs that a rollback began."""
    return {event.message.epoch for event in timeline.events if isinstance(event.message, Rollback)}


def _works(timeline: Timeline, kind: type[Proposal | Verdict]) -> list[_Busy]:
    """Return all steps of the draft, or all passes of the verify model, in order."""
    works = [
        _busy(timeline, one, event.message)
        for event in timeline.events
        if isinstance(event.message, Proposal | Verdict) and isinstance(event.message, kind)
        for one in _times(event.message)
    ]
    return sorted(works, key=lambda one: one.started_seconds)


def _times(message: Proposal | Verdict) -> tuple[DeviceTime, ...]:
    return message.steps if isinstance(message, Proposal) else message.passes


def _busy(timeline: Timeline, time: DeviceTime, message: Proposal | Verdict) -> _Busy:
    started = (time.started_unix_nanos - timeline.started_unix_nanos) * 1e-9
    return _Busy(started, started + time.seconds, message)
