"""When draft and verify device worked in a generation, and on what.

Rules of this file
- All times are seconds since the request arrived, by the orchestrator's clock. What a device says
  by its own clock is brought there: see ``_clock_shift``.
- Work of one device_timeline is in order and never overlaps; the gaps between are idle time.
- Steps and their tokens: of a proposal's steps the last ones wrote its tokens, one each; more than
  that, in a session's first proposal, read the prompt, and later ones were dropped. A look-up
  writes several tokens a step, and has the outcome of the first.
"""

import enum
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from amusd.analysis.timeline import Timeline, TimelineEvent, TokenOutcome, token_outcomes
from amusd.protocol.events import DeviceTime, Forward, Proposal, Rollback, Verdict


class Kind(enum.Enum):
    """What a device worked on, or what came of it."""

    PROMPT = "prompt"
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    WASTED = "wasted"
    NOTHING = "nothing to propose"
    PLAIN = "plain pass"
    CONFIRMED = "all accepted"
    CORRECTED = "corrected"


@dataclass(frozen=True, slots=True)
class Span:
    """A time ``[started, ended)``."""

    started_seconds: float
    ended_seconds: float

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.ended_seconds - self.started_seconds


@dataclass(frozen=True, slots=True)
class Work:
    """One step of the draft, or one pass of the verify model, and the message that told of it."""

    span: Span
    kind: Kind
    message: Proposal | Verdict


@dataclass(frozen=True, slots=True)
class DeviceTimeline:
    """All work of one device, within ``[0, ended_seconds)``.

    ``clock_shift_seconds``: how much its clock seems to be ahead of the orchestrator's.
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
        """The times at which it did not."""
        return tuple(gaps([work.span for work in self.works], self.ended_seconds))


@dataclass(frozen=True, slots=True)
class DeviceTimelines:
    """Both devices over the same time."""

    draft: DeviceTimeline
    verify: DeviceTimeline

    @property
    def ended_seconds(self) -> float:
        """Where both devices end."""
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
    """Return what both devices did."""
    draft_works = list(_draft_works(timeline))
    verify_works = list(_verify_works(timeline.events))
    draft_shift = _clock_shift(draft_works, _rollback_times(timeline.events), timeline)
    verify_shift = _clock_shift(verify_works, _forward_times(timeline.events), timeline)
    draft = _placed(draft_works, draft_shift, timeline)
    verify = _placed(verify_works, verify_shift, timeline)
    last_event = timeline.events[-1].seconds if timeline.events else 0.0
    end = max([last_event, *(work.span.ended_seconds for work in (*draft, *verify))])
    return DeviceTimelines(
        DeviceTimeline(draft, end, draft_shift), DeviceTimeline(verify, end, verify_shift)
    )


@dataclass(frozen=True, slots=True)
class Check:
    """A pass that checked what a step had drafted."""

    step: Work
    checked_by: Work


def checks(devices: DeviceTimelines) -> Iterator[Check]:
    """Yield the last step of each proposal that was checked, and the pass over its first token."""
    last_steps = {id(work.message): work for work in devices.draft.works}
    # The last pass of a verdict is the one that checked; those before it read the prompt.
    passes: dict[tuple[int, int], Work] = {}
    for work in devices.verify.works:
        if isinstance(work.message, Verdict):
            for index in range(work.message.num_checked):
                passes[work.message.epoch, work.message.position + index] = work
    for step in last_steps.values():
        checked_by = passes.get((step.message.epoch, step.message.position))
        if checked_by is not None and step.kind not in (Kind.PROMPT, Kind.NOTHING):
            yield Check(step, checked_by)


def gaps(spans: Sequence[Span], end_seconds: float) -> Iterator[Span]:
    """Yield what ``spans``, in order and without overlap, leave of ``[0, end_seconds)``."""
    last = 0.0
    for span in spans:
        if span.started_seconds > last:
            yield Span(last, span.started_seconds)
        last = span.ended_seconds
    if end_seconds > last:
        yield Span(last, end_seconds)


def overlaps(first: Sequence[Span], second: Sequence[Span]) -> Iterator[Span]:
    """Yield the times within a span of both; each is in order and without overlap of its own."""
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
class _Told:
    """Work as its device tells of it; ``event`` is the message's arrival."""

    time: DeviceTime
    kind: Kind
    event: TimelineEvent
    message: Proposal | Verdict
    is_last: bool


def _draft_works(timeline: Timeline) -> Iterator[_Told]:
    outcomes = iter(token_outcomes(timeline))
    surplus = Kind.PROMPT
    for event in timeline.events:
        proposal = event.message
        if not isinstance(proposal, Proposal):
            continue
        kinds = _step_kinds(proposal, next(outcomes), surplus)
        if proposal.steps:
            surplus = Kind.WASTED
        for index, (step, kind) in enumerate(zip(proposal.steps, kinds, strict=True), 1):
            yield _Told(step, kind, event, proposal, index == len(proposal.steps))


def _step_kinds(
    proposal: Proposal, outcomes: tuple[TokenOutcome, ...], surplus: Kind
) -> list[Kind]:
    """Return what each step of a proposal came to."""
    num_steps = len(proposal.steps)
    if not outcomes:
        return ([surplus] * num_steps)[:-1] + [Kind.NOTHING] * min(1, num_steps)
    of_tokens = [Kind(outcome.value) for outcome in outcomes]
    if num_steps < len(outcomes):
        return of_tokens[:1] * num_steps
    return [surplus] * (num_steps - len(outcomes)) + of_tokens


def _verify_works(events: Sequence[TimelineEvent]) -> Iterator[_Told]:
    is_first = True
    # What a verdict calls for follows it at once.
    for event, following in zip(events, (*events[1:], None), strict=False):
        verdict = event.message
        if not isinstance(verdict, Verdict):
            continue
        rolls_back = following is not None and isinstance(following.message, Rollback)
        kind = _pass_kind(verdict, is_first, rolls_back)
        is_first = False
        for index, one in enumerate(verdict.passes, 1):
            is_last = index == len(verdict.passes)
            yield _Told(one, kind if is_last else Kind.PROMPT, event, verdict, is_last)


def _pass_kind(verdict: Verdict, is_first: bool, rolls_back: bool) -> Kind:
    if verdict.num_checked == 0 and is_first:
        return Kind.PROMPT
    # The proposal after those that were checked may turn out wrong, too.
    if verdict.num_accepted < verdict.num_checked or rolls_back:
        return Kind.CORRECTED
    return Kind.CONFIRMED if verdict.num_checked else Kind.PLAIN


def _clock_shift(
    works: Sequence[_Told], sent_seconds: dict[tuple[int, int], float], timeline: Timeline
) -> float:
    """Return how much a device's clock is ahead of the orchestrator's, as far as messages tell.

    No work ends after the message that tells of it has come, and none begins before what it needs
    was sent, ``sent_seconds`` by epoch and position, or before the request arrived. If these hold
    as it is, the clocks are taken to agree, as they do on one host; else the middle of what is
    possible is taken, which is off by half the time that messages take at most.
    """
    least, most = -math.inf, math.inf
    for work in works:
        started = _since(timeline, work.time)
        least = max(least, started + work.time.seconds - work.event.seconds)
        place = _needs(work.message) if work.is_last else None
        most = min(most, started - (sent_seconds.get(place, 0.0) if place else 0.0))
    if not works or least <= 0.0 <= most:
        return 0.0
    return (least + most) / 2


def _needs(message: Proposal | Verdict) -> tuple[int, int] | None:
    """Return epoch and position of what had to be sent before the last step or pass began."""
    if isinstance(message, Proposal):
        return (message.epoch, 0) if message.tokens else None
    if message.num_checked:
        return (message.epoch, message.position + message.num_checked - 1)
    return None


def _rollback_times(events: Sequence[TimelineEvent]) -> dict[tuple[int, int], float]:
    """Return when each epoch of the draft was begun, by epoch and 0."""
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
                place = (event.message.epoch, event.message.position + index)
                times.setdefault(place, event.seconds)
    return times


def _placed(works: Sequence[_Told], shift: float, timeline: Timeline) -> tuple[Work, ...]:
    """Return work on the orchestrator's clock, cut where a clock that was set makes it overlap."""
    placed: list[Work] = []
    last = 0.0
    for work in sorted(works, key=lambda work: work.time.started_unix_nanos):
        started = _since(timeline, work.time) - shift
        span = Span(max(last, started), max(last, started + work.time.seconds))
        placed.append(Work(span, work.kind, work.message))
        last = span.ended_seconds
    return tuple(placed)


def _since(timeline: Timeline, time: DeviceTime) -> float:
    return (time.started_unix_nanos - timeline.started_unix_nanos) * 1e-9
