"""Statistics from the events that the recorder receives."""

import dataclasses

import pytest

from amusd.analysis.generation_statistics import (
    PositionAcceptance,
    SourceAcceptance,
    Statistics,
    StatisticsRecorder,
)
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.events import Proposal, Verdict
from amusd.protocol.ledger import Ledger
from amusd.protocol.strategy import Strategy
from tests.protocol.scenario import Schedule, Setup
from tests.protocol.simulation import Simulation


def checked(num_checked: int, num_accepted: int) -> Verdict:
    return Verdict(0, 2, num_checked, num_accepted, next_token=1, pass_seconds=0.5)


def summary_of(*verdicts: Verdict) -> Statistics:
    recorder = StatisticsRecorder(started_seconds=100.0)
    for verdict in verdicts:
        recorder.verdict(verdict)
    return recorder.summary(Ledger([10, 11]), num_output_tokens=0, now_seconds=101.0)


def test_acceptance_is_counted_per_position_in_a_pass() -> None:
    assert summary_of(checked(3, 3), checked(2, 1), checked(3, 2)).acceptance_per_position == (
        PositionAcceptance(3, 3),
        PositionAcceptance(3, 2),
        PositionAcceptance(2, 1),
    )


def test_tokens_after_the_first_rejected_one_do_not_count() -> None:
    assert summary_of(checked(4, 0)).acceptance_per_position == (PositionAcceptance(1, 0),)


def test_an_autoregressive_pass_compares_nothing() -> None:
    assert summary_of(checked(0, 0)).acceptance_per_position == ()


def test_busy_times_add_up() -> None:
    recorder = StatisticsRecorder(started_seconds=0.0)
    recorder.proposal(Proposal(0, 2, (20,), draft_seconds=0.25, num_steps=1))
    recorder.proposal(Proposal(0, 3, (21,), draft_seconds=0.5, num_steps=2))
    recorder.verdict(checked(1, 1))
    recorder.verdict(checked(1, 0))
    summary = recorder.summary(Ledger([10]), 0, 9.0)
    assert (summary.draft_busy_seconds, summary.verify_busy_seconds) == (0.75, 1.0)


def test_a_session_counts_its_share_of_a_shared_pass() -> None:
    recorder = StatisticsRecorder(started_seconds=0.0)
    recorder.proposal(Proposal(0, 2, (20,), draft_seconds=0.5, num_steps=1, device_seconds=0.125))
    recorder.verdict(dataclasses.replace(checked(1, 1), device_seconds=0.25))
    summary = recorder.summary(Ledger([10]), 0, 9.0)
    assert (summary.draft_busy_seconds, summary.verify_busy_seconds) == (0.125, 0.25)


def test_cached_prompt_tokens_are_counted() -> None:
    assert summary_of(checked(0, 0)).num_cached_prompt_tokens == 0
    first = dataclasses.replace(checked(0, 0), num_cached=7)
    assert summary_of(first, checked(1, 0)).num_cached_prompt_tokens == 7


def test_the_first_token_is_timed_once() -> None:
    recorder = StatisticsRecorder(started_seconds=100.0)
    recorder.tokens(100.5)
    recorder.tokens(101.0)
    summary = recorder.summary(Ledger([10]), 2, 102.0)
    assert (summary.time_to_first_token_seconds, summary.wall_seconds) == (0.5, 2.0)


def test_without_a_token_the_first_one_took_all_the_time() -> None:
    assert summary_of().time_to_first_token_seconds == 1.0


def test_rates_are_0_where_nothing_was_counted() -> None:
    summary = summary_of()
    assert (summary.tokens_per_pass, summary.acceptance_rate) == (0.0, 0.0)


def test_the_reason_for_a_lost_draft_is_kept() -> None:
    recorder = StatisticsRecorder(0.0, fallback_reason="it died")
    assert recorder.summary(Ledger([10]), 0, 1.0).fallback_reason == "it died"


@pytest.mark.parametrize("strategy", Strategy)
def test_the_summary_of_a_run_adds_up(strategy: Strategy) -> None:
    run = Simulation(Setup(strategy, max_tokens=60)).run(Schedule(1))
    summary = StatisticsRecorder(0.0).summary(run.ledger, 60, 1.0)
    settled = summary.num_accepted + summary.num_rejected + summary.num_wasted
    assert summary.num_drafted == settled
    assert summary.num_rejected == summary.num_rollbacks
    assert summary.tokens_per_pass == 60 / run.ledger.counts.passes
    assert 0.0 <= summary.acceptance_rate <= 1.0
    assert summary.num_prompt_tokens == 2


def test_the_sources_of_a_run_add_up() -> None:
    run = Simulation(Setup(agreement=0.9, mixes_sources=True, max_tokens=60)).run(Schedule(1))
    summary = StatisticsRecorder(0.0).summary(run.ledger, 60, 1.0)
    sources = summary.acceptance_per_source
    assert [one.source for one in sources] == list(DraftSource)
    assert sum(one.num_drafted for one in sources) == summary.num_drafted
    assert sum(one.num_accepted for one in sources) == summary.num_accepted
    compared = summary.num_accepted + summary.num_rejected
    assert sum(one.num_checked for one in sources) == compared


def test_a_source_that_proposed_nothing_is_left_out() -> None:
    ledger = Ledger([10])
    ledger.proposal(Proposal(0, 1, (20, 21), source=DraftSource.LOOKUP))
    summary = StatisticsRecorder(0.0).summary(ledger, 0, 1.0)
    assert summary.acceptance_per_source == (SourceAcceptance(DraftSource.LOOKUP, 2),)
