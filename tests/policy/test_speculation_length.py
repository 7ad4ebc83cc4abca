"""The speculation length, learned from passes with known times."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.policy.speculation_length import SpeculationLength, StepTimes
from amusd.protocol.events import Verdict


def trained(
    *passes: tuple[int, int, float], max_checked: int = 8, num_times: int = 40
) -> SpeculationLength:
    """Return a policy that saw each ``(num_checked, num_accepted, pass_seconds)`` repeatedly."""
    policy = SpeculationLength(max_checked, StepTimes())
    for _ in range(num_times):
        for num_checked, num_accepted, seconds in passes:
            policy.observe(Verdict(0, 2, num_checked, num_accepted, 1, seconds))
    return policy


def times(**seconds: float) -> StepTimes:
    """Return the step times after one pass over each ``over_<num_tokens>``."""
    known = StepTimes()
    for name, value in seconds.items():
        known.observe_pass(int(name.removeprefix("over_")), value)
    return known


# Step times


def test_without_a_pass_no_time_is_known() -> None:
    assert StepTimes().pass_seconds(3) is None


def test_times_between_two_known_sizes_are_interpolated() -> None:
    assert times(over_2=0.02, over_6=0.04).pass_seconds(3) == pytest.approx(0.025)


@pytest.mark.parametrize(("num_tokens", "seconds"), [(1, 0.02), (2, 0.02), (6, 0.04), (9, 0.04)])
def test_a_size_outside_the_known_range_takes_as_long_as_the_nearest(
    num_tokens: int, seconds: float
) -> None:
    assert times(over_2=0.02, over_6=0.04).pass_seconds(num_tokens) == seconds


def test_a_disturbed_pass_does_not_count() -> None:
    known = times(over_2=0.02, over_4=0.5, over_6=0.04)
    assert known.pass_seconds(4) == 0.04
    assert known.pass_seconds(5) == 0.04
    assert known.pass_seconds(3) == pytest.approx(0.03)


@given(st.dictionaries(st.integers(1, 300), st.floats(0.001, 1.0), min_size=1, max_size=50))
def test_a_larger_pass_is_never_estimated_to_take_less(seconds: dict[int, float]) -> None:
    known = StepTimes()
    for num_tokens, value in seconds.items():
        known.observe_pass(num_tokens, value)
    estimates = [known.pass_seconds(num_tokens) for num_tokens in range(1, 320)]
    assert all(
        one is not None and other is not None and one <= other + 1e-9
        for one, other in itertools.pairwise(estimates)
    )


def test_large_sizes_close_to_each_other_share_a_bucket() -> None:
    assert times(over_100=0.1, over_103=0.2).pass_seconds(104) == pytest.approx(0.12)


def test_times_adapt_to_a_change() -> None:
    known = times(over_2=0.02)
    for _ in range(50):
        known.observe_pass(2, 0.08)
    assert known.pass_seconds(2) == pytest.approx(0.08, rel=0.01)


def test_sessions_share_pass_times_but_not_acceptance() -> None:
    shared = StepTimes()
    first, second = SpeculationLength(8, shared), SpeculationLength(8, shared)
    prior = second.acceptance
    for num_checked, seconds in [(1, 0.02), (8, 0.16)] * 20:
        first.observe(Verdict(0, 2, num_checked, 0, 1, seconds))
    assert second.acceptance == prior
    assert second.best() < SpeculationLength(8, StepTimes()).best()


# Lengths


def test_without_a_pass_everything_is_checked() -> None:
    assert SpeculationLength(8, StepTimes()).best() == 8


def test_if_rows_cost_nothing_everything_is_checked() -> None:
    assert trained((1, 1, 0.02), (8, 6, 0.02)).best() == 8


def test_with_expensive_rows_and_a_poor_draft_one_proposal_is_checked() -> None:
    assert trained((1, 0, 0.02), (8, 0, 0.16)).best() == 1


def test_with_a_perfect_draft_rows_pay_if_they_cost_less_than_a_pass() -> None:
    assert trained((1, 1, 0.02), (8, 8, 0.08)).best() == 8


def test_if_late_positions_cost_more_than_they_yield_a_middle_length_is_best() -> None:
    policy = trained((1, 1, 0.020), (4, 2, 0.023), (8, 4, 0.060))
    assert 2 <= policy.best() <= 5


def test_untried_lengths_are_tried_while_they_may_pay() -> None:
    assert trained((2, 2, 0.02)).best() == 8


def test_acceptance_counts_only_compared_tokens() -> None:
    assert trained((8, 1, 0.02), num_times=400).acceptance == pytest.approx(0.5, abs=0.05)


def test_a_pass_without_proposals_changes_times_but_not_acceptance() -> None:
    policy = SpeculationLength(8, StepTimes())
    before = policy.acceptance
    policy.observe(Verdict(0, 2, 0, 0, 1, 0.02))
    assert policy.acceptance == before
    assert policy.times.pass_seconds(1) == 0.02


def test_max_checked_is_not_exceeded() -> None:
    assert trained((1, 1, 0.02), (3, 3, 0.02), max_checked=3).best() == 3


# Sessions that share passes


def sharing(num_sessions: int, seconds_per_token: float) -> SpeculationLength:
    """Return the policy of one of several sessions whose passes take longer by each token."""
    policy = SpeculationLength(8, StepTimes())
    for number, num_checked in enumerate((0, 1, 4, 8) * 20):
        num_accepted = num_checked if number // 4 % 2 else 0
        num_tokens = (num_checked + 1) * num_sessions
        seconds = 0.02 + num_tokens * seconds_per_token
        shared = Verdict(0, 2, num_checked, num_accepted, 1, seconds, seconds / num_sessions)
        policy.observe(shared)
    return policy


def test_a_shared_pass_is_timed_by_all_its_tokens() -> None:
    assert sharing(4, 0.001).times.pass_seconds(20) == pytest.approx(0.04, rel=0.05)


def test_the_more_sessions_share_passes_the_fewer_tokens_each_proposes() -> None:
    lengths = [sharing(number, 0.001).best() for number in (1, 4, 16)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]


@pytest.mark.parametrize("number", [1, 4, 16])
def test_the_number_of_sharing_sessions_is_estimated_from_times(number: int) -> None:
    assert sharing(number, 0.001).num_sharing == pytest.approx(number, rel=0.1)


def test_if_tokens_cost_nothing_sharing_changes_nothing() -> None:
    assert sharing(16, 0.0).best() == sharing(1, 0.0).best() == 8


def test_many_sharing_sessions_do_not_wait_for_a_draft() -> None:
    policy = sharing(32, 0.002)
    policy.times.observe_draft(0.02)
    assert policy.best_start(num_ready=0, next_seconds=0.02) == 0


# Start of an idle verify model


def ready_to_start(draft_seconds: float) -> SpeculationLength:
    """Return a policy for passes of 20 ms at any size, and high acceptance."""
    policy = trained((0, 0, 0.02), (1, 1, 0.02), (8, 8, 0.02))
    policy.times.observe_draft(draft_seconds)
    return policy


def test_without_a_pass_the_first_proposal_is_awaited_and_starts_one() -> None:
    policy = SpeculationLength(8, StepTimes())
    assert policy.best_start(num_ready=0, next_seconds=0.0) == 1
    assert policy.best_start(num_ready=1, next_seconds=0.0) == 1


def test_a_proposal_that_comes_much_later_than_a_pass_ends_is_not_awaited() -> None:
    assert ready_to_start(0.05).best_start(num_ready=0, next_seconds=1.0) == 0


def test_a_fast_draft_is_worth_waiting_for() -> None:
    assert ready_to_start(0.0001).best_start(num_ready=0, next_seconds=0.0001) == 8


def test_a_slow_draft_is_not_awaited_if_something_is_ready() -> None:
    assert ready_to_start(0.05).best_start(num_ready=1, next_seconds=0.05) == 1


def test_all_ready_proposals_are_used() -> None:
    assert ready_to_start(0.05).best_start(num_ready=12, next_seconds=0.0) == 12


# Look-ahead of the draft


@pytest.mark.parametrize(("num_accepted", "lookahead"), [(0, 1), (1, 3), (8, 8)])
def test_the_lookahead_grows_with_acceptance(num_accepted: int, lookahead: int) -> None:
    policy = trained((8, num_accepted, 0.02), num_times=400)
    assert policy.useful_lookahead() == lookahead


@given(
    st.lists(
        st.tuples(st.integers(0, 8), st.integers(0, 8), st.floats(0.001, 1.0)).filter(
            lambda one: one[1] <= one[0]
        ),
        max_size=8,
    ),
    st.floats(0.0, 0.1),
    st.integers(0, 8),
    st.floats(0.0, 1.0),
)
def test_no_more_proposals_are_awaited_than_the_lookahead_allows(
    passes: list[tuple[int, int, float]],
    draft_seconds: float,
    num_ready: int,
    next_seconds: float,
) -> None:
    policy = trained(*passes, num_times=5)
    policy.times.observe_draft(draft_seconds)
    wanted = policy.best_start(num_ready, next_seconds)
    assert num_ready <= wanted <= max(num_ready, policy.useful_lookahead())


@given(
    st.dictionaries(st.integers(1, 60), st.floats(0.001, 1.0), max_size=20),
    st.integers(1, 16),
    st.floats(1.0, 8.0),
)
def test_the_times_of_all_lengths_are_those_of_each_length(
    seconds: dict[int, float], max_length: int, num_sharing: float
) -> None:
    known = StepTimes()
    for num_tokens, value in seconds.items():
        known.observe_pass(num_tokens, value)
    found = known.seconds_of_lengths(max_length, num_sharing)
    one_by_one = [known.pass_seconds((n + 1) * num_sharing) for n in range(max_length + 1)]
    assert found == ([] if not seconds else pytest.approx(one_by_one))
