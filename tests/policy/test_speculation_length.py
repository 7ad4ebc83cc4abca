"""How many proposals a pass should check, learnt from passes whose times are known."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.policy.speculation_length import SpeculationLength, StepTimes
from amusd.protocol.events import Verdict


def taught(
    *passes: tuple[int, int, float], max_checked: int = 8, num_times: int = 40
) -> SpeculationLength:
    """Return a sizer that saw ``(num_checked, num_accepted, pass_seconds)`` many times over."""
    sizer = SpeculationLength(max_checked, StepTimes())
    for _ in range(num_times):
        for num_checked, num_accepted, seconds in passes:
            sizer.observe(Verdict(0, 2, num_checked, num_accepted, 1, seconds))
    return sizer


def times(**seconds: float) -> StepTimes:
    """Return what is known after one pass of each size, named ``over_<size>``."""
    known = StepTimes()
    for name, value in seconds.items():
        known.observe_pass(int(name.removeprefix("over_")), value)
    return known


# Times


def test_before_any_pass_no_time_is_known() -> None:
    assert StepTimes().pass_seconds(3) is None


def test_between_two_known_sizes_time_grows_evenly() -> None:
    assert times(over_2=0.02, over_6=0.04).pass_seconds(3) == pytest.approx(0.025)


@pytest.mark.parametrize(("num_tokens", "seconds"), [(1, 0.02), (2, 0.02), (6, 0.04), (9, 0.04)])
def test_a_size_out_of_the_known_range_costs_as_much_as_the_nearest(
    num_tokens: int, seconds: float
) -> None:
    assert times(over_2=0.02, over_6=0.04).pass_seconds(num_tokens) == seconds


def test_a_disturbed_pass_is_not_held_against_its_size() -> None:
    known = times(over_2=0.02, over_4=0.5, over_6=0.04)
    assert known.pass_seconds(4) == 0.04
    assert known.pass_seconds(5) == 0.04
    assert known.pass_seconds(3) == pytest.approx(0.03)


@given(st.dictionaries(st.integers(1, 300), st.floats(0.001, 1.0), min_size=1, max_size=50))
def test_a_pass_over_more_tokens_is_never_reckoned_to_take_less(seconds: dict[int, float]) -> None:
    known = StepTimes()
    for num_tokens, value in seconds.items():
        known.observe_pass(num_tokens, value)
    reckoned = [known.pass_seconds(num_tokens) for num_tokens in range(1, 320)]
    assert all(
        one is not None and other is not None and one <= other + 1e-9
        for one, other in itertools.pairwise(reckoned)
    )


def test_large_sizes_close_to_each_other_are_one() -> None:
    assert times(over_100=0.1, over_103=0.2).pass_seconds(104) == pytest.approx(0.12)


def test_times_follow_a_change() -> None:
    known = times(over_2=0.02)
    for _ in range(50):
        known.observe_pass(2, 0.08)
    assert known.pass_seconds(2) == pytest.approx(0.08, rel=0.01)


def test_sessions_share_what_passes_take_but_not_their_acceptance() -> None:
    shared = StepTimes()
    first, second = SpeculationLength(8, shared), SpeculationLength(8, shared)
    prior = second.acceptance
    for num_checked, seconds in [(1, 0.02), (8, 0.16)] * 20:
        first.observe(Verdict(0, 2, num_checked, 0, 1, seconds))
    assert second.acceptance == prior
    assert second.best() < SpeculationLength(8, StepTimes()).best()


# Sizes


def test_before_any_pass_all_that_is_proposed_is_checked() -> None:
    assert SpeculationLength(8, StepTimes()).best() == 8


def test_where_rows_cost_nothing_all_that_is_proposed_is_checked() -> None:
    assert taught((1, 1, 0.02), (8, 6, 0.02)).best() == 8


def test_where_rows_cost_as_much_as_passes_a_poor_draft_is_checked_one_by_one() -> None:
    assert taught((1, 0, 0.02), (8, 0, 0.16)).best() == 1


def test_a_perfect_draft_is_worth_rows_that_cost_less_than_a_pass() -> None:
    assert taught((1, 1, 0.02), (8, 8, 0.08)).best() == 8


def test_where_late_places_cost_more_than_they_yield_a_middle_size_is_best() -> None:
    sizer = taught((1, 1, 0.020), (4, 2, 0.023), (8, 4, 0.060))
    assert 2 <= sizer.best() <= 5


def test_sizes_larger_than_were_tried_are_tried_as_long_as_they_may_pay() -> None:
    assert taught((2, 2, 0.02)).best() == 8


def test_acceptance_counts_compared_tokens_only() -> None:
    assert taught((8, 1, 0.02), num_times=400).acceptance == pytest.approx(0.5, abs=0.05)


def test_a_plain_pass_teaches_its_time_but_nothing_of_acceptance() -> None:
    sizer = SpeculationLength(8, StepTimes())
    before = sizer.acceptance
    sizer.observe(Verdict(0, 2, 0, 0, 1, 0.02))
    assert sizer.acceptance == before
    assert sizer.times.pass_seconds(1) == 0.02


def test_the_limit_is_kept() -> None:
    assert taught((1, 1, 0.02), (3, 3, 0.02), max_checked=3).best() == 3


# Sessions that share passes


def sharing(num_sessions: int, seconds_a_token: float) -> SpeculationLength:
    """Return a sizer of one of several sessions whose passes grow by each token."""
    sizer = SpeculationLength(8, StepTimes())
    for num_checked in (0, 1, 4, 8) * 20:
        num_tokens = (num_checked + 1) * num_sessions
        seconds = 0.02 + num_tokens * seconds_a_token
        shared = Verdict(
            0, 2, num_checked, (num_checked + 1) // 2, 1, seconds, seconds / num_sessions
        )
        sizer.observe(shared)
    return sizer


def test_the_time_of_a_shared_pass_is_that_of_all_its_tokens() -> None:
    assert sharing(4, 0.001).times.pass_seconds(20) == pytest.approx(0.04, rel=0.05)


def test_the_more_share_a_pass_that_grows_the_less_each_proposes() -> None:
    sizes = [sharing(number, 0.001).best() for number in (1, 4, 16)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


@pytest.mark.parametrize("number", [1, 4, 16])
def test_how_many_share_a_pass_is_found_from_its_times(number: int) -> None:
    assert sharing(number, 0.001).num_sharing == pytest.approx(number, rel=0.1)


def test_where_tokens_cost_nothing_sharing_changes_nothing() -> None:
    assert sharing(16, 0.0).best() == sharing(1, 0.0).best() == 8


def test_many_that_share_a_pass_do_not_wait_for_a_draft() -> None:
    sizer = sharing(32, 0.002)
    sizer.times.observe_draft(0.02)
    assert sizer.best_start(num_ready=0, next_seconds=0.02) == 0


# Starts of an idle verify model


def ready_to_start(draft_seconds: float) -> SpeculationLength:
    """ModelRunner take 20 ms over any size, and acceptance is high."""
    sizer = taught((0, 0, 0.02), (1, 1, 0.02), (8, 8, 0.02))
    sizer.times.observe_draft(draft_seconds)
    return sizer


def test_before_any_pass_the_first_proposal_is_waited_for_and_starts_one() -> None:
    sizer = SpeculationLength(8, StepTimes())
    assert sizer.best_start(num_ready=0, next_seconds=0.0) == 1
    assert sizer.best_start(num_ready=1, next_seconds=0.0) == 1


def test_a_proposal_that_comes_much_later_than_a_plain_pass_is_not_waited_for() -> None:
    assert ready_to_start(0.05).best_start(num_ready=0, next_seconds=1.0) == 0


def test_a_cheap_draft_is_worth_waiting_for() -> None:
    assert ready_to_start(0.0001).best_start(num_ready=0, next_seconds=0.0001) == 8


def test_a_dear_draft_is_not_waited_for_once_something_is_ready() -> None:
    assert ready_to_start(0.05).best_start(num_ready=1, next_seconds=0.05) == 1


def test_what_is_ready_is_never_sent_back() -> None:
    assert ready_to_start(0.05).best_start(num_ready=12, next_seconds=0.0) == 12


# How far the draft runs ahead


@pytest.mark.parametrize(("num_accepted", "lookahead"), [(0, 1), (1, 5), (8, 8)])
def test_a_draft_runs_ahead_as_far_as_a_token_has_a_chance(
    num_accepted: int, lookahead: int
) -> None:
    sizer = taught((8, num_accepted, 0.02), num_times=400)
    assert sizer.useful_lookahead() == lookahead


@given(
    st.lists(
        st.tuples(st.integers(0, 8), st.integers(0, 8), st.floats(0.001, 1.0)).filter(
            lambda it: it[1] <= it[0]
        ),
        max_size=8,
    ),
    st.floats(0.0, 0.1),
    st.integers(0, 8),
    st.floats(0.0, 1.0),
)
def test_no_more_is_waited_for_than_the_draft_is_let_write(
    passes: list[tuple[int, int, float]],
    draft_seconds: float,
    num_ready: int,
    next_seconds: float,
) -> None:
    sizer = taught(*passes, num_times=5)
    sizer.times.observe_draft(draft_seconds)
    wanted = sizer.best_start(num_ready, next_seconds)
    assert num_ready <= wanted <= max(num_ready, sizer.useful_lookahead())
