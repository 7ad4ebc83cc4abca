"""Laws of the whole protocol, over any order of events.

The simulation checks two laws in every one of these runs: each part's own integrity after each
move, and at each event of the ledger that a mismatch is noticed in that event.
"""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from amusd.protocol.finish import FinishReason
from amusd.protocol.ledger import Ledger
from amusd.protocol.strategy import Strategy
from tests.protocol.scenario import VOCABULARY, Move, Schedule, Setup, verify_models_own
from tests.protocol.simulation import Simulation

DRAFTING = (Strategy.SPECULATIVE, Strategy.AMUSD)

laws = settings(max_examples=250, deadline=None)


def schedules() -> st.SearchStrategy[Schedule]:
    """Some moves one by one, then by lot: weights make one part much quicker than another."""
    weights = st.fixed_dictionaries({move: st.sampled_from([1, 4, 16]) for move in Move})
    choices = st.lists(st.integers(0, 11), max_size=40)
    return st.builds(Schedule, st.integers(0, 2**32), weights, choices)


@st.composite
def setups(draw: st.DrawFn, /, **fixed: Any) -> Setup:
    """Any session without mishaps, its draft within its limits."""
    lookahead = draw(st.integers(1, 8))
    setup = Setup(
        strategy=draw(st.sampled_from(DRAFTING)),
        lookahead=lookahead,
        agreement=draw(st.sampled_from([0.0, 0.3, 0.7, 0.9, 1.0])),
        num_prompt=draw(st.integers(1, 4)),
        max_tokens=draw(st.integers(1, 24)),
        seed=draw(st.integers(0, 2**20)),
        max_checked=draw(st.integers(0, lookahead)),
        num_collected=draw(st.integers(1, lookahead)),
        num_branches=draw(st.integers(0, 3)),
        branch_depth=draw(st.integers(1, 4)),
        max_branches=draw(st.sampled_from([0, 1, 2, 8])),
        grows_branches=draw(st.booleans()),
        has_chances=draw(st.booleans()),
        min_use=draw(st.sampled_from([0.0, 0.05, 0.5])),
    )
    return replace(setup, **fixed)


@st.composite
def mishaps(draw: st.DrawFn) -> Setup:
    """Any session with everything that may happen to it."""
    return replace(
        draw(setups()),
        strategy=draw(st.sampled_from(Strategy)),
        draft_context=draw(st.sampled_from([1000, 10, 15, 20])),
        silence=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        tokens_per_step=draw(st.integers(1, 4)),
        stop_tokens=draw(st.frozensets(st.integers(0, VOCABULARY - 1), max_size=1)),
        num_repeats=draw(st.sampled_from([0, 10])),
        dies_after=draw(st.none() | st.integers(1, 120)),
        verify_dies_after=draw(st.none() | st.integers(1, 120)),
        impatient=draw(st.booleans()),
        mixes_sources=draw(st.booleans()),
    )


@given(mishaps(), schedules())
@settings(max_examples=600, deadline=None)
def test_the_output_is_always_the_verify_models_own(setup: Setup, schedule: Schedule) -> None:
    run = Simulation(setup).run(schedule)
    assert run.orchestrator.output == verify_models_own(setup)


@given(mishaps(), schedules())
@laws
def test_final_tokens_are_never_taken_back(setup: Setup, schedule: Schedule) -> None:
    run = Simulation(setup)
    before = run.ledger.tokens
    for _ in run.steps(schedule):
        assert run.ledger.tokens[: len(before)] == before
        before = run.ledger.tokens


@given(mishaps(), schedules())
@laws
def test_every_part_stays_whole_after_every_move(setup: Setup, schedule: Schedule) -> None:
    run = Simulation(setup)
    run.check()
    for _ in run.steps(schedule):
        run.check()


@given(setups(), schedules())
@laws
def test_while_the_draft_lives_no_wait_needs_patience(setup: Setup, schedule: Schedule) -> None:
    assert not setup.impatient
    run = Simulation(setup).run(schedule)  # which fails as soon as nothing can happen
    assert run.orchestrator.reason is FinishReason.LENGTH


@given(setups(), schedules(), st.sampled_from([3, 7, 12, 20]), st.sampled_from([0.0, 0.5, 1.0]))
@laws
def test_a_draft_that_has_nothing_to_propose_says_so(
    setup: Setup, schedule: Schedule, context: int, silence: float
) -> None:
    assume(context > setup.num_prompt)
    setup = replace(setup, draft_context=context, silence=silence, tokens_per_step=2)
    Simulation(setup).run(schedule)


@given(setups(), schedules(), st.integers(1, 120))
@laws
def test_a_draft_may_die_at_any_moment(setup: Setup, schedule: Schedule, moment: int) -> None:
    setup = replace(setup, dies_after=moment)
    run = Simulation(setup).run(schedule)
    assert run.orchestrator.output == verify_models_own(setup)


@given(setups(), schedules(), st.integers(1, 120))
@laws
def test_a_session_may_move_to_another_verify_service_at_any_moment(
    setup: Setup, schedule: Schedule, moment: int
) -> None:
    setup = replace(setup, verify_dies_after=moment)
    run = Simulation(setup).run(schedule)
    assert run.orchestrator.output == verify_models_own(setup)


@given(mishaps(), schedules())
@laws
def test_every_drafted_token_is_accepted_rejected_or_wasted(
    setup: Setup, schedule: Schedule
) -> None:
    run = Simulation(replace(setup, num_repeats=0)).run(schedule)
    counts = run.ledger.counts
    assert counts.drafted == counts.accepted + counts.rejected + counts.wasted
    assert counts.drafted == run.orchestrator.watch.num_proposed_by.total()
    assert counts.rollbacks == run.ledger.epoch == counts.rejected


@given(mishaps(), schedules())
@laws
def test_every_token_is_settled_for_the_source_that_wrote_it(
    setup: Setup, schedule: Schedule
) -> None:
    setup = replace(setup, mixes_sources=True, num_repeats=0, dies_after=None)
    run = Simulation(setup).run(schedule)
    watch = run.orchestrator.watch
    for source, outcome in run.ledger.counts.by_source.items():
        assert outcome.drafted == watch.num_proposed_by[source]
        assert (outcome.accepted, outcome.rejected) == (
            watch.num_right[source],
            watch.num_wrong[source],
        )


@given(setups(strategy=Strategy.AMUSD, mixes_sources=True, impatient=True), schedules())
@laws
def test_draft_and_ledger_count_the_same_tokens_for_a_source(
    setup: Setup, schedule: Schedule
) -> None:
    # Tokens that are collected, and compared before they are sent, count on the draft's side only.
    run = Simulation(replace(setup, collects=False))
    for _ in run.steps(schedule):
        assert run.draft is not None
        under_way = [(one.source, len(one.tokens)) for one in run.draft.sent]
        for source, outcome in run.ledger.counts.by_source.items():
            counts = run.draft.session.tracker.counts[source]
            num_under_way = sum(num for one, num in under_way if one is source)
            assert counts.num_accepted <= outcome.accepted + num_under_way
            num_wrong = counts.num_checked - counts.num_accepted
            assert num_wrong <= outcome.rejected + num_under_way


@given(setups(impatient=True, agreement=0.3), schedules())
@laws
def test_a_mismatch_is_noticed_in_the_event_that_reveals_it(
    setup: Setup, schedule: Schedule
) -> None:
    Simulation(setup).run(schedule)  # which watches for it


@given(mishaps(), schedules())
@laws
def test_the_draft_never_runs_beyond_its_lookahead(setup: Setup, schedule: Schedule) -> None:
    run = Simulation(setup)
    for _ in run.steps(schedule):
        if run.draft is not None:
            drafted_end = run.draft.session.length
            final_end = run.ledger.verified_position
            assert drafted_end <= max(final_end + setup.lookahead, setup.num_prompt)
            assert run.ledger.num_speculated <= setup.lookahead


@given(mishaps(), schedules())
@laws
def test_a_message_that_comes_again_changes_no_token(setup: Setup, schedule: Schedule) -> None:
    # A branch that was dropped for want of room may be taken when it comes again.
    run = Simulation(replace(setup, num_repeats=30, max_branches=64))
    before = _state(run)
    for move in run.steps(schedule):
        if move is Move.REPEAT:
            assert _state(run) == before
        before = _state(run)


@given(
    setups(strategy=Strategy.AMUSD, agreement=0.3, num_branches=1, max_branches=64, impatient=True),
    schedules(),
)
@laws
def test_a_branch_that_was_held_for_the_outcome_is_in_the_next_pass(
    setup: Setup, schedule: Schedule
) -> None:
    run = Simulation(setup)
    for move in run.steps(schedule):
        rejected = run.verify.last_rejection
        if move is Move.END and rejected is not None:
            held, started = rejected
            assert started == (held.tokens if held is not None else ())


@given(setups(agreement=1.0, impatient=True), schedules(), st.sampled_from(DRAFTING))
@laws
def test_perfect_agreement_never_rolls_back(
    setup: Setup, schedule: Schedule, strategy: Strategy
) -> None:
    run = Simulation(replace(setup, strategy=strategy)).run(schedule)
    assert run.ledger.counts.rollbacks == run.ledger.counts.rejected == 0


@given(setups(agreement=1.0, strategy=Strategy.AMUSD), schedules())
@laws
def test_amusd_in_perfect_agreement_gives_more_than_one_token_a_pass(
    setup: Setup, schedule: Schedule
) -> None:
    run = Simulation(setup).run(schedule)
    num_passes = run.ledger.counts.passes
    # The first pass has nothing to check; the last may have room for one token only.
    assert len(run.ledger.output) >= 2 * num_passes - 2


@given(setups(strategy=Strategy.AUTOREGRESSIVE), schedules())
@laws
def test_autoregressive_gives_one_token_a_pass(setup: Setup, schedule: Schedule) -> None:
    run = Simulation(setup).run(schedule)
    assert run.ledger.counts.passes == setup.max_tokens
    assert run.ledger.counts.drafted == 0


@given(setups(), st.lists(schedules(), min_size=3, max_size=3))
@laws
def test_all_strategies_give_the_same_tokens(setup: Setup, orders: list[Schedule]) -> None:
    runs = [
        Simulation(replace(setup, strategy=strategy)).run(order)
        for strategy, order in zip(Strategy, orders, strict=True)
    ]
    assert len({run.orchestrator.output for run in runs}) == 1


@pytest.mark.parametrize("strategy", DRAFTING)
def test_the_simulation_reaches_every_race(strategy: Strategy) -> None:
    """Guards the tests above: a simulation in which nothing goes wrong would prove nothing."""
    setup = Setup(
        strategy,
        agreement=0.3,
        max_tokens=40,
        num_repeats=5,
        verify_dies_after=60,
        impatient=True,
        num_branches=1,
        branch_depth=3,
        grows_branches=True,
    )
    moves: set[Move] = set()
    num_stale = num_late_mismatches = num_overtaken = num_rollbacks = num_grown_late = 0
    for seed in range(20):
        run = Simulation(replace(setup, seed=seed))
        moves.update(run.steps(Schedule(seed, {Move.ADVANCE: 1, Move.ROLLBACK: 4})))
        num_stale += run.orchestrator.watch.num_stale
        num_late_mismatches += run.orchestrator.watch.num_late_mismatches
        num_grown_late += run.orchestrator.watch.num_grown_late
        num_overtaken += run.num_overtaken
        num_rollbacks += run.ledger.counts.rollbacks
    assert moves == set(Move)
    assert min(num_stale, num_late_mismatches, num_overtaken, num_rollbacks) >= 5
    assert num_grown_late >= 5 or strategy is not Strategy.AMUSD


def _state(run: Simulation) -> tuple[object, ...]:
    ledger: Ledger = run.ledger
    return repr(ledger), ledger.tokens, repr(run.verify.session), ledger.counts.passes
