"""Device timelines: when the draft and the verify device worked in a generation, and on what.

Rules of this file
- All times are seconds since the request arrived, on the orchestrator's clock. Times of a device's
  own clock are converted: see ``_clock_shift``.
- The work of one device is in order and never overlaps. The gaps are idle time.
- The last steps of the model's proposal drafted its tokens, one token each. In a session's first
  proposal the steps before them are prefill; in later proposals they are steps whose tokens were
  dropped. Proposals of an n-gram lookup, and those without tokens, took no step of their own.
"""

import enum
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from amusd.analysis.timeline import Timeline, TimelineEvent, TokenOutcome, token_outcomes
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.events import DeviceTime, Forward, Proposal, Rollback, Verdict


class Kind(enum.Enum):
    """What a device worked on, and the outcome."""

    PREFILL = "prefill"
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    WASTED = "wasted"
    AUTOREGRESSIVE = "autoregressive"
    CONFIRMED = "all accepted"
    CORRECTED = "corrected"


@dataclass(frozen=True, slots=True)
class Span:
    """A time ``[started, ended)``."""

    started_seconds: float
    ended_seconds: float

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.ended_seconds - self.started_seconds


@dataclass(frozen=True, slots=True)
class Work:
    """One draft step or one verify pass, and the message that reported it."""

    span: Span
    kind: Kind
    message: Proposal | Verdict


@dataclass(frozen=True, slots=True)
class DeviceTimeline:
    """All work of one device, within ``[0, ended_seconds)``.

    ``clock_shift_seconds`` is the estimated lead of its clock over the orchestrator's.
    """

    works: tuple[Work, ...]
    ended_seconds: float
    clock_shift_seconds: float = 0.0

    @property
    def busy_seconds(self) -> float:
        """Time that the device worked."""
        return math.fsum(work.span.seconds for work in self.works)

    @property
    def idle(self) -> tuple[Span, ...]:
        """The times at which the device did not work."""
        return tuple(gaps([work.span for work in self.works], self.ended_seconds))


@dataclass(frozen=True, slots=True)
class DeviceTimelines:
    """The timelines of both devices over the same period."""

    draft: DeviceTimeline
    verify: DeviceTimeline

    @property
    def ended_seconds(self) -> float:
        """The end of both timelines."""
        return self.draft.ended_seconds

    @property
    def both(self) -> tuple[Span, ...]:
        """The times at which both devices worked."""
        draft = [work.span for work in self.draft.works]
        return tuple(overlaps(draft, [work.span for work in self.verify.works]))

    @property
    def overlap_seconds(self) -> float:
        """How long both devices worked at the same time."""
        return math.fsum(span.seconds for span in self.both)


def device_timelines(timeline: Timeline) -> DeviceTimelines:
    """Return the device timelines of a generation."""
    draft_works = list(_draft_works(timeline))
    verify_works = list(_verify_works(timeline.events))
    draft_shift = _clock_shift(draft_works, _rollback_times(timeline.events), timeline)
    verify_shift = _clock_shift(verify_works, _forward_times(timeline.events), timeline)
    draft = _aligned(draft_works, draft_shift, timeline)
    verify = _aligned(verify_works, verify_shift, timeline)
    last_event = timeline.events[-1].seconds if timeline.events else 0.0
    end = max([last_event, *(work.span.ended_seconds for work in (*draft, *verify))])
    return DeviceTimelines(
        DeviceTimeline(draft, end, draft_shift), DeviceTimeline(verify, end, verify_shift)
    )


@dataclass(frozen=True, slots=True)
class Check:
    """A draft step, and the pass that checked its token."""

    step: Work
    checked_by: Work


def checks(devices: DeviceTimelines) -> Iterator[Check]:
    """Yield the last step of each proposal that was checked, and the pass over its first token."""
    last_steps = {id(work.message): work for work in devices.draft.works}
    # The last pass of a verdict checked tokens; the passes before it are prefill.
    passes: dict[tuple[int, int], Work] = {}
    for work in devices.verify.works:
        if isinstance(work.message, Verdict):
            for index in range(work.message.num_checked):
                passes[work.message.epoch, work.message.position + index] = work
    for step in last_steps.values():
        checked_by = passes.get((step.message.epoch, step.message.position))
        if checked_by is not None and step.kind is not Kind.PREFILL:
            yield Check(step, checked_by)


def gaps(spans: Sequence[Span], end_seconds: float) -> Iterator[Span]:
    """Yield the parts of ``[0, end_seconds)`` outside ``spans``, which are sorted and disjoint."""
    last = 0.0
    for span in spans:
        if span.started_seconds > last:
            yield Span(last, span.started_seconds)
        last = span.ended_seconds
    if end_seconds > last:
        yield Span(last, end_seconds)


def overlaps(first: Sequence[Span], second: Sequence[Span]) -> Iterator[Span]:
    """Yield the times that both sequences cover; the spans of each are sorted and disjoint."""
    index = other = 0
    while index < len(first) and other < len(second):
        one, two = first[index], second[other]
        started = max(one.started_seconds, two.started_seconds)
        ended = min(one.ended_seconds, two.ended_seconds)
        if started < ended:
            yield Span(started, ended)
        if one.ended_seconds < two.ended_seconds:
            index += 1
        else:
            other += 1


@dataclass(frozen=True, slots=True)
class _Reported:
    """Work as its device reports it; ``event`` is the arrival of the message."""

    time: DeviceTime
    kind: Kind
    event: TimelineEvent
    message: Proposal | Verdict
    is_last: bool


def _draft_works(timeline: Timeline) -> Iterator[_Reported]:
    outcomes = iter(token_outcomes(timeline))
    surplus = Kind.PREFILL
    for event in timeline.events:
        proposal = event.message
        if not isinstance(proposal, Proposal):
            continue
        kinds = _step_kinds(proposal, next(outcomes), surplus)
        if proposal.steps:
            surplus = Kind.WASTED
        for index, (step, kind) in enumerate(zip(proposal.steps, kinds, strict=True), 1):
            yield _Reported(step, kind, event, proposal, index == len(proposal.steps))


def _step_kinds(
    proposal: Proposal, outcomes: tuple[TokenOutcome, ...], surplus: Kind
) -> list[Kind]:
    """Return the kind of each step of a proposal; ``surplus`` for steps without a token."""
    num_steps = len(proposal.steps)
    if not outcomes or proposal.source is not DraftSource.MODEL:
        return [surplus] * num_steps
    of_tokens = [Kind(outcome.value) for outcome in outcomes]
    if num_steps < len(outcomes):
        return of_tokens[:1] * num_steps
    return [surplus] * (num_steps - len(outcomes)) + of_tokens


def _verify_works(events: Sequence[TimelineEvent]) -> Iterator[_Reported]:
    is_first = True
    # A verdict's rollback follows it directly.
    for event, following in zip(events, (*events[1:], None), strict=False):
        verdict = event.message
        if not isinstance(verdict, Verdict):
            continue
        rolls_back = following is not None and isinstance(following.message, Rollback)
        kind = _pass_kind(verdict, is_first, rolls_back)
        is_first = False
        for index, one in enumerate(verdict.passes, 1):
            is_last = index == len(verdict.passes)
            yield _Reported(one, kind if is_last else Kind.PREFILL, event, verdict, is_last)


def _pass_kind(verdict: Verdict, is_first: bool, rolls_back: bool) -> Kind:
    if verdict.num_checked == 0 and is_first:
        return Kind.PREFILL
    # The verdict's next token may also reject a proposal that the pass did not check.
    if verdict.num_accepted < verdict.num_checked or rolls_back:
        return Kind.CORRECTED
    return Kind.CONFIRMED if verdict.num_checked else Kind.AUTOREGRESSIVE


def _clock_shift(
    works: Sequence[_Reported], sent_seconds: dict[tuple[int, int], float], timeline: Timeline
) -> float:
    """Estimate how much a device's clock is ahead of the orchestrator's.

    Messages bound the shift from both sides. Work ends before the message that reports it arrives.
    It starts after the message that it needs was sent (``sent_seconds`` by epoch and position), and
    after the request arrived. If a shift of 0 satisfies all bounds, the clocks agree, as on one
    host. Otherwise the middle of the bounds is taken; its error is at most half a round trip.
    """
    least, most = -math.inf, math.inf
    for work in works:
        started = _since(timeline, work.time)
        least = max(least, started + work.time.seconds - work.event.seconds)
        needed = _needs(work.message) if work.is_last else None
        most = min(most, started - (sent_seconds.get(needed, 0.0) if needed else 0.0))
    if not works or least <= 0.0 <= most:
        return 0.0
    return (least + most) / 2


def _needs(message: Proposal | Verdict) -> tuple[int, int] | None:
    """Return epoch and position of the message that the last step or pass needs; None for none."""
    if isinstance(message, Proposal):
        return (message.epoch, 0) if message.tokens else None
    if message.num_checked:
        return (message.epoch, message.position + message.num_checked - 1)
    return None


def _rollback_times(events: Sequence[TimelineEvent]) -> dict[tuple[int, int], float]:
    """Return when the rollback of each epoch was sent, by epoch and 0."""
    return {
        (event.message.epoch, 0): event.seconds
        for event in events
        if isinstance(event.message, Rollback)
    }


def _forward_times(events: Sequence[TimelineEvent]) -> dict[tuple[int, int], float]:
    """Return when each token was sent to the verify service, by epoch and position."""
    times: dict[tuple[int, int], float] = {}
    for event in events:
        if isinstance(event.message, Forward):
            for index in range(len(event.message.tokens)):
                token = (event.message.epoch, event.message.position + index)
                times.setdefault(token, event.seconds)
    return times


def _aligned(works: Sequence[_Reported], shift: float, timeline: Timeline) -> tuple[Work, ...]:
    """Return work on the orchestrator's clock.

    A clock that was set during the generation can make work overlap; the overlap is cut off.
    """
    aligned: list[Work] = []
    last = 0.0
    for work in sorted(works, key=lambda work: work.time.started_unix_nanos):
        started = _since(timeline, work.time) - shift
        span = Span(max(last, started), max(last, started + work.time.seconds))
        aligned.append(Work(span, work.kind, work.message))
        last = span.ended_seconds
    return tuple(aligned)


def _since(timeline: Timeline, time: DeviceTime) -> float:
    return (time.started_unix_nanos - timeline.started_unix_nanos) * 1e-9
