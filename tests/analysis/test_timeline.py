"""Recording of timelines, and the outcome of every drafted token."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.analysis.timeline import (
    Timeline,
    TimelineEvent,
    TimelineRecorder,
    TokenOutcome,
    token_outcomes,
)
from amusd.protocol.events import (
    NOTHING,
    Advance,
    Decision,
    DeviceTime,
    Forward,
    Proposal,
    Rollback,
    Verdict,
)
from tests.analysis.timelines import timeline_of
from tests.protocol.scenario import Schedule, Setup
from tests.protocol.simulation import Simulation
from tests.protocol.test_protocol_properties import laws, mishaps, schedules

WRITTEN = Proposal(0, 3, (20,))
FORWARDED = Forward(0, 3, (20,))
ACCEPTED, REJECTED, WASTED = TokenOutcome.ACCEPTED, TokenOutcome.REJECTED, TokenOutcome.WASTED


def outcomes_of(*messages: Proposal | Verdict) -> list[tuple[TokenOutcome, ...]]:
    events = tuple(TimelineEvent(float(index), one) for index, one in enumerate(messages))
    return token_outcomes(Timeline(0, events))


# Recording


def test_messages_follow_their_cause_in_the_order_of_sending() -> None:
    recorder = TimelineRecorder(started_unix_nanos=1_000_000_000)
    verdict, rollback = Verdict(0, 3, 1, 0, 9), Rollback(1, 4, 9)
    advance = Advance(1, 4, (8,))
    recorder.decided(WRITTEN, Decision(forward=FORWARDED), 1_250_000_000)
    recorder.decided(verdict, Decision(rollback, advance, committed=(9,)), 1_500_000_000)
    timeline = recorder.timeline()
    expected = [
        (0.25, WRITTEN),
        (0.25, FORWARDED),
        (0.5, verdict),
        (0.5, rollback),
        (0.5, advance),
    ]
    assert [(event.seconds, event.message) for event in timeline.events] == expected
    assert not timeline.is_truncated


def test_an_event_that_is_no_message_records_only_its_decision() -> None:
    recorder = TimelineRecorder(0)
    recorder.decided(None, Decision(forward=FORWARDED), 1)
    recorder.decided(None, NOTHING, 2)
    assert [event.message for event in recorder.timeline().events] == [FORWARDED]


@given(st.integers(0, 40))
def test_a_full_timeline_keeps_its_beginning_and_is_marked(max_entries: int) -> None:
    whole, short = TimelineRecorder(0), TimelineRecorder(0, max_entries)
    step = DeviceTime(0, 0.1)
    for position in range(8):
        proposal = Proposal(0, position, (1, 2), steps=(step,) * position)
        for recorder in (whole, short):
            recorder.decided(proposal, NOTHING, position)
    all_events, kept = whole.timeline().events, short.timeline().events
    assert kept == all_events[: len(kept)]
    assert short.timeline().is_truncated == (len(kept) < len(all_events))
    sizes = [3 + position for position in range(8)]
    assert sum(sizes[: len(kept)]) <= max_entries or not kept
    assert sum(sizes[: len(kept) + 1]) > max_entries or len(kept) == len(sizes)


# Outcomes


def test_tokens_are_accepted_up_to_the_wrong_one_and_wasted_after_it() -> None:
    proposal = Proposal(0, 3, (20, 21, 22, 23))
    assert outcomes_of(Verdict(0, 2, 0, 0, 5), proposal, Verdict(0, 3, 4, 2, 9)) == [
        (ACCEPTED, ACCEPTED, REJECTED, WASTED)
    ]


def test_a_proposal_that_waits_is_compared_with_the_verify_models_own_token() -> None:
    right, wrong = Proposal(0, 2, (5,)), Proposal(0, 2, (6,))
    assert outcomes_of(right, Verdict(0, 2, 0, 0, 5)) == [(ACCEPTED,)]
    assert outcomes_of(wrong, Verdict(0, 2, 0, 0, 5)) == [(REJECTED,)]


def test_a_late_proposal_of_an_old_epoch_is_wasted_even_if_its_token_is_right() -> None:
    wrong, late = Proposal(0, 2, (6,)), Proposal(0, 3, (7,))
    last = Verdict(0, 3, 0, 0, 7)
    assert outcomes_of(wrong, Verdict(0, 2, 0, 0, 5), late, last) == [(REJECTED,), (WASTED,)]


def test_unverified_tokens_at_the_end_are_wasted() -> None:
    assert outcomes_of(Verdict(0, 2, 0, 0, 5), WRITTEN) == [(WASTED,)]


def test_a_proposal_that_breaks_the_protocol_is_wasted() -> None:
    ahead = replace(WRITTEN, position=9)
    assert outcomes_of(Verdict(0, 2, 0, 0, 5), ahead, Verdict(0, 3, 0, 0, 5)) == [(WASTED,)]


def test_an_empty_timeline_has_no_outcomes() -> None:
    assert token_outcomes(Timeline(0, ())) == []


@laws
@given(mishaps(), schedules())
def test_outcomes_add_up_to_the_counts_of_the_ledger(setup: Setup, schedule: Schedule) -> None:
    run = Simulation(replace(setup, num_repeats=0, num_branches=0))
    timeline = timeline_of(run, schedule)
    counts = run.ledger.counts
    outcomes = Counter(outcome for one in token_outcomes(timeline) for outcome in one)
    assert outcomes[ACCEPTED] == counts.accepted
    assert outcomes[REJECTED] == counts.rejected
    assert outcomes[WASTED] == counts.wasted


@pytest.mark.parametrize("outcome", TokenOutcome)
def test_every_outcome_occurs_in_a_run(outcome: TokenOutcome) -> None:
    timeline = timeline_of(Simulation(Setup(max_tokens=60)), Schedule(1))
    assert any(outcome in one for one in token_outcomes(timeline))
