"""The legs of a rollback cycle, found in timelines made by hand and in simulated ones."""

from dataclasses import replace

from hypothesis import given

from amusd.analysis.message_latency import (
    Leg,
    message_counts,
    message_latencies,
    num_late_rollbacks,
)
from amusd.analysis.timeline import Message, Timeline, TimelineEvent
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.events import Advance, DeviceTime, Forward, Proposal, Rollback, Verdict
from tests.analysis.timelines import STARTED_UNIX_NANOS, timeline_of
from tests.protocol.scenario import Schedule, Setup
from tests.protocol.simulation import Simulation
from tests.protocol.test_protocol_properties import laws, mishaps, schedules


def worked(*spans_ms: tuple[float, float]) -> tuple[DeviceTime, ...]:
    """Work from so many milliseconds after the request to so many."""
    return tuple(
        DeviceTime(STARTED_UNIX_NANOS + round(1e6 * started), 1e-3 * (ended - started))
        for started, ended in spans_ms
    )


def timeline_from(*messages: tuple[float, Message]) -> Timeline:
    """Return a timeline of messages and their milliseconds."""
    events = tuple(TimelineEvent(1e-3 * at_ms, message) for at_ms, message in messages)
    return Timeline(STARTED_UNIX_NANOS, events)


def legs_ms(timeline: Timeline, leg: Leg, in_cycle: bool | None = None) -> list[float]:
    """Return the latencies of a leg in ms, those in a cycle, those outside one, or all."""
    return [
        round(1e3 * one.seconds, 6)
        for one in message_latencies(timeline)
        if one.leg is leg and in_cycle in (None, one.in_cycle)
    ]


# A prompt, a pass that rejects token 6, and the cycle that follows.
CYCLE = (
    (2.0, Verdict(0, 2, 0, 0, 5, passes=worked((0, 1)))),
    (4.0, Proposal(0, 3, (6,), steps=worked((2, 3)))),
    (4.0, Forward(0, 3, (6,))),
    (7.5, Verdict(0, 3, 1, 0, 9, passes=worked((5, 7)))),
    (7.5, Rollback(1, 4, 9)),
    (10.5, Proposal(1, 4, (8,), steps=worked((7, 8), (8.25, 9.75)))),
    (10.5, Forward(1, 4, (8,))),
    (15.0, Verdict(1, 4, 1, 1, 8, passes=worked((11, 14)))),
    (15.0, Advance(1, 4, (8, 8))),
)


def test_a_cycle_has_four_legs() -> None:
    timeline = timeline_from(*CYCLE)
    assert legs_ms(timeline, Leg.VERDICT, in_cycle=True) == [0.5]
    assert legs_ms(timeline, Leg.ROLLBACK, in_cycle=True) == [0.25]  # from the running step's end
    assert legs_ms(timeline, Leg.PROPOSAL, in_cycle=True) == [0.75]
    assert legs_ms(timeline, Leg.FORWARD, in_cycle=True) == [0.5]


def test_messages_outside_of_cycles_are_told_apart() -> None:
    timeline = timeline_from(*CYCLE)
    assert legs_ms(timeline, Leg.VERDICT, in_cycle=False) == [1.0, 1.0]
    assert legs_ms(timeline, Leg.ROLLBACK, in_cycle=False) == []
    assert legs_ms(timeline, Leg.PROPOSAL, in_cycle=False) == [1.0]
    assert legs_ms(timeline, Leg.FORWARD, in_cycle=False) == [1.0]


def test_only_the_first_messages_of_an_epoch_are_in_its_cycle() -> None:
    later = (
        (12.0, Proposal(1, 5, (8,), steps=worked((9.75, 11.25)))),
        (12.0, Forward(1, 5, (8,))),
        (20.0, Verdict(1, 6, 1, 1, 8, passes=worked((15.5, 18)))),
    )
    timeline = timeline_from(*CYCLE, *later)
    assert legs_ms(timeline, Leg.PROPOSAL, in_cycle=True) == [0.75]
    assert legs_ms(timeline, Leg.FORWARD, in_cycle=True) == [0.5]


def test_an_idle_draft_counts_from_the_decision() -> None:
    timeline = timeline_from(
        (7.5, Rollback(1, 4, 9)), (10.0, Proposal(1, 4, (8,), steps=worked((6, 7), (8.5, 9))))
    )
    assert legs_ms(timeline, Leg.ROLLBACK) == [1.0]
    assert num_late_rollbacks(timeline) == 0


def test_a_step_of_the_old_epoch_after_the_decision_counts_as_latency() -> None:
    steps = worked((7, 8), (8, 9), (9.25, 10))  # the second began before the rollback came
    timeline = timeline_from((7.5, Rollback(1, 4, 9)), (10.0, Proposal(1, 4, (8,), steps=steps)))
    assert legs_ms(timeline, Leg.ROLLBACK) == [1.25]
    assert num_late_rollbacks(timeline) == 1


def test_clocks_that_were_set_make_no_rollback_negative() -> None:
    timeline = timeline_from(
        (7.5, Rollback(1, 4, 9)), (10.0, Proposal(1, 4, (8,), steps=worked((7.25, 8))))
    )
    assert legs_ms(timeline, Leg.ROLLBACK) == [0.0]


def test_the_first_step_of_several_collected_tokens_ends_the_rollback() -> None:
    proposal = Proposal(1, 4, (8, 9), steps=worked((0.5, 1), (2, 2.5), (3, 3.5)))
    timeline = timeline_from((1.5, Rollback(1, 4, 9)), (5.0, proposal))
    assert legs_ms(timeline, Leg.ROLLBACK) == [0.5]


def test_an_ngram_lookup_has_no_step_and_no_leg() -> None:
    steps = worked((0.5, 1), (2, 2.5))  # of the model, and dropped
    proposal = Proposal(1, 4, (8, 9), source=DraftSource.LOOKUP, steps=steps)
    timeline = timeline_from((1.5, Rollback(1, 4, 9)), (5.0, proposal))
    assert legs_ms(timeline, Leg.ROLLBACK) == legs_ms(timeline, Leg.PROPOSAL) == []


def test_a_pass_without_proposals_is_started_by_its_forward() -> None:
    timeline = timeline_from(
        (2.0, Rollback(1, 4, 9)),
        (2.0, Forward(1, 4, ())),
        (6.0, Forward(1, 4, (8,))),  # while the pass runs
        (7.5, Verdict(0, 4, 0, 0, 8, passes=worked((2.25, 7)))),
    )
    assert legs_ms(timeline, Leg.FORWARD, in_cycle=True) == [0.25]
    assert legs_ms(timeline, Leg.FORWARD, in_cycle=False) == []


def test_a_forward_during_a_pass_waits_for_the_pass_and_does_not_count() -> None:
    timeline = timeline_from(
        (5.5, Forward(1, 5, (8,))),
        (7.5, Verdict(1, 4, 1, 1, 7, passes=worked((5, 7)))),
        (12.0, Verdict(1, 6, 1, 1, 8, passes=worked((8, 10)))),
    )
    assert legs_ms(timeline, Leg.FORWARD) == []


def test_a_forward_that_the_next_pass_leaves_out_does_not_count() -> None:
    timeline = timeline_from(
        (4.5, Forward(0, 4, (7,))),
        (7.5, Verdict(0, 3, 1, 1, 7, passes=worked((5, 7)))),
        (12.0, Verdict(0, 4, 1, 1, 8, passes=worked((8, 10)))),
    )
    assert legs_ms(timeline, Leg.FORWARD) == []


def test_a_forward_of_a_dropped_epoch_does_not_count() -> None:
    timeline = timeline_from(
        (4.5, Forward(0, 3, (7,))), (7.5, Verdict(1, 3, 1, 1, 7, passes=worked((5, 7))))
    )
    assert legs_ms(timeline, Leg.FORWARD) == []


def test_services_that_report_no_times_have_no_latencies() -> None:
    bare = [
        (at, replace(one, passes=()) if isinstance(one, Verdict) else
             replace(one, steps=()) if isinstance(one, Proposal) else one)
        for at, one in CYCLE
    ]  # fmt: skip
    assert list(message_latencies(timeline_from(*bare))) == []
    assert list(message_latencies(timeline_from())) == []


def test_messages_are_counted_by_kind() -> None:
    counts = message_counts(timeline_from(*CYCLE))
    assert counts == {"verdict": 3, "rollback": 1, "advance": 1, "proposal": 2, "forward": 2}


@laws
@given(mishaps(), schedules())
def test_no_message_takes_less_than_no_time(setup: Setup, schedule: Schedule) -> None:
    timeline = timeline_of(Simulation(replace(setup, num_repeats=0)), schedule)
    latencies = list(message_latencies(timeline))
    assert all(one.seconds >= -1e-9 for one in latencies)
    counts = message_counts(timeline)
    for leg in Leg:
        name = "verdict" if leg is Leg.VERDICT else leg.name.lower()
        found = [one for one in latencies if one.leg is leg]
        assert len(found) <= counts[name]
        assert sum(one.in_cycle for one in found) <= counts["rollback"]
