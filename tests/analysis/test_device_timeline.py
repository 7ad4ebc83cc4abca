"""Device timelines: work in order on both devices, idle time, overlap, clocks."""

import dataclasses
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.analysis.device_timeline import (
    DeviceTimelines,
    Kind,
    Span,
    checks,
    device_timelines,
    gaps,
    overlaps,
)
from amusd.analysis.timeline import Message, Timeline, TimelineEvent
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.events import (
    DeviceTime,
    Forward,
    Proposal,
    Rollback,
    Verdict,
)
from tests.analysis.timelines import STARTED_UNIX_NANOS, timeline_of
from tests.protocol.scenario import Schedule, Setup
from tests.protocol.simulation import Simulation
from tests.protocol.test_protocol_properties import laws, mishaps, schedules

FIRST = Verdict(0, 2, 0, 0, 5)


def worked(*starts_ms: int, seconds: float = 0.001) -> tuple[DeviceTime, ...]:
    """Return work that started so many milliseconds after the request."""
    return tuple(DeviceTime(STARTED_UNIX_NANOS + 1_000_000 * one, seconds) for one in starts_ms)


def devices_of(*messages: tuple[float, Message]) -> DeviceTimelines:
    """Return the device timelines of messages, each with its time in milliseconds."""
    events = tuple(TimelineEvent(1e-3 * at_ms, message) for at_ms, message in messages)
    return device_timelines(Timeline(STARTED_UNIX_NANOS, events))


def kinds(devices: DeviceTimelines) -> tuple[list[Kind], list[Kind]]:
    return [one.kind for one in devices.draft.works], [one.kind for one in devices.verify.works]


def spans(edges: list[int]) -> list[Span]:
    """Pair up edges in order."""
    pairs = zip(edges[::2], edges[1::2], strict=False)
    return [Span(float(started), float(ended)) for started, ended in pairs]


def covered(of: list[Span]) -> set[int]:
    """The whole seconds within spans of whole seconds."""
    return {
        second
        for span in of
        for second in range(int(span.started_seconds), int(span.ended_seconds))
    }


edges = st.lists(st.integers(0, 60), unique=True, max_size=20).map(sorted)


# Spans


@given(edges, edges)
def test_overlaps_are_the_seconds_that_both_cover(first: list[int], second: list[int]) -> None:
    one, two = spans(first), spans(second)
    both = list(overlaps(one, two))
    assert covered(both) == covered(one) & covered(two)
    assert both == list(overlaps(two, one))
    assert sum(span.seconds for span in both) == len(covered(both))


@given(edges, st.integers(60, 70))
def test_gaps_are_the_seconds_that_nothing_covers(some: list[int], end: int) -> None:
    busy = spans(some)
    idle = list(gaps(busy, float(end)))
    assert covered(idle) == set(range(end)) - covered(busy)
    assert sum(span.seconds for span in (*idle, *busy)) == end


# Kinds of work


def test_the_last_steps_of_a_proposal_drafted_its_tokens() -> None:
    draft, verify = kinds(
        devices_of(
            (4, Proposal(0, 2, (5, 6), num_steps=3, steps=worked(1, 2, 3))),
            (5, replace(FIRST, passes=worked(1, 4))),
            (7, Proposal(0, 4, (8,), num_steps=2, steps=worked(5, 6))),
            (9, Verdict(0, 3, 1, 1, 9, passes=worked(8))),
            (9, Rollback(1, 5, 9)),
        )
    )
    assert draft == [Kind.PREFILL, Kind.ACCEPTED, Kind.ACCEPTED, Kind.WASTED, Kind.REJECTED]
    assert verify == [Kind.PREFILL, Kind.PREFILL, Kind.CORRECTED]


def test_a_lookup_has_no_step_of_its_own() -> None:
    drafted = Proposal(0, 2, (5,), num_steps=1, steps=worked(1))
    found = Proposal(0, 3, (6, 7, 8), source=DraftSource.LOOKUP, num_steps=1, steps=worked(2))
    verdict = Verdict(0, 3, 3, 1, 9, passes=worked(4))
    draft, verify = kinds(devices_of((1, FIRST), (2, drafted), (3, found), (6, verdict)))
    assert draft == [Kind.ACCEPTED, Kind.WASTED]  # the model's step before the lookup was dropped
    assert verify == [Kind.CORRECTED]


def test_the_kind_of_a_pass_depends_on_what_it_checked() -> None:
    _, verify = kinds(
        devices_of(
            (1, replace(FIRST, passes=worked(0))),
            (3, Verdict(0, 3, 0, 0, 6, passes=worked(2))),
            (4, Proposal(0, 4, (7, 8))),
            (6, Verdict(0, 4, 2, 2, 9, passes=worked(5))),
        )
    )
    assert verify == [Kind.PREFILL, Kind.AUTOREGRESSIVE, Kind.CONFIRMED]


def test_the_steps_before_an_empty_proposal_are_prefill_or_wasted() -> None:
    first = Proposal(0, 2, (), num_steps=2, steps=worked(1, 2))
    second = Proposal(0, 2, (), num_steps=1, steps=worked(3))
    draft, _ = kinds(devices_of((3, first), (4, second)))
    assert draft == [Kind.PREFILL, Kind.PREFILL, Kind.WASTED]


def test_a_service_that_reports_no_times_has_an_empty_timeline() -> None:
    devices = devices_of((1, FIRST), (2, Proposal(0, 3, (6,), 0.001, 1)))
    assert kinds(devices) == ([], [])
    assert devices.verify.idle == (Span(0.0, 0.002),)


def test_an_empty_timeline_has_no_work() -> None:
    devices = devices_of()
    assert kinds(devices) == ([], [])
    assert (devices.ended_seconds, devices.overlap_seconds) == (0.0, 0.0)


def test_a_checked_proposal_is_tied_to_the_pass_over_its_first_token() -> None:
    devices = devices_of(
        (1, replace(FIRST, passes=worked(0))),
        (3, Proposal(0, 3, (6,), steps=worked(2))),
        (3, Forward(0, 3, (6,))),
        (5, Proposal(0, 4, (7,), steps=worked(4))),
        (7, Verdict(0, 3, 1, 1, 7, passes=worked(5, 6))),
    )
    (check,) = checks(devices)
    assert check.step is devices.draft.works[0]
    assert check.checked_by is devices.verify.works[-1]


# Clocks


def shifted(timeline: Timeline, draft_seconds: float, verify_seconds: float) -> Timeline:
    """Set the devices' clocks ahead."""

    def ahead(times: tuple[DeviceTime, ...], seconds: float) -> tuple[DeviceTime, ...]:
        nanos = round(1e9 * seconds)
        return tuple(
            replace(one, started_unix_nanos=one.started_unix_nanos + nanos) for one in times
        )

    def moved(message: Message) -> Message:
        match message:
            case Proposal():
                return replace(message, steps=ahead(message.steps, draft_seconds))
            case Verdict():
                return replace(message, passes=ahead(message.passes, verify_seconds))
            case _:
                return message

    events = tuple(replace(one, message=moved(one.message)) for one in timeline.events)
    return replace(timeline, events=events)


@laws
@given(mishaps(), schedules())
def test_clocks_that_agree_are_not_shifted(setup: Setup, schedule: Schedule) -> None:
    timeline = timeline_of(Simulation(replace(setup, num_repeats=0)), schedule)
    devices = device_timelines(timeline)
    assert devices.draft.clock_shift_seconds == devices.verify.clock_shift_seconds == 0.0


@laws
@given(mishaps(), schedules(), st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_work_never_overlaps_whatever_the_clocks(
    setup: Setup, schedule: Schedule, draft_seconds: float, verify_seconds: float
) -> None:
    timeline = timeline_of(Simulation(replace(setup, num_repeats=0)), schedule)
    devices = device_timelines(shifted(timeline, draft_seconds, verify_seconds))
    for device_timeline in (devices.draft, devices.verify):
        last = 0.0
        for work in device_timeline.works:
            assert last <= work.span.started_seconds <= work.span.ended_seconds
            last = work.span.ended_seconds
        assert last <= device_timeline.ended_seconds
        idle_seconds = math.fsum(span.seconds for span in device_timeline.idle)
        assert device_timeline.busy_seconds + idle_seconds == pytest.approx(devices.ended_seconds)
    most = min(devices.draft.busy_seconds, devices.verify.busy_seconds)
    assert 0.0 <= devices.overlap_seconds <= most + 1e-9


@pytest.mark.parametrize("ahead", [-3600.0, -1.0, 1.0, 3600.0])
def test_a_clock_that_is_far_off_is_brought_back_to_where_messages_allow(ahead: float) -> None:
    timeline = timeline_of(Simulation(Setup(max_tokens=40)), Schedule(1))
    devices = device_timelines(shifted(timeline, ahead, 0.0))
    assert devices.verify.clock_shift_seconds == 0.0
    assert devices.draft.clock_shift_seconds == pytest.approx(ahead, abs=0.002)
    for work in devices.draft.works:
        event = next(one for one in shifted(timeline, ahead, 0.0).events
                     if one.message == work.message)  # fmt: skip
        assert work.span.ended_seconds <= event.seconds + 1e-6


def test_a_clock_that_was_set_back_in_between_makes_nothing_overlap() -> None:
    first = replace(FIRST, passes=worked(0, seconds=0.002))
    second = Verdict(0, 3, 0, 0, 6, passes=worked(1, seconds=0.002))
    devices = devices_of((3, first), (6, second))
    assert [dataclasses.astuple(one.span) for one in devices.verify.works] == [
        pytest.approx((0.0, 0.002)),
        pytest.approx((0.002, 0.003)),
    ]
