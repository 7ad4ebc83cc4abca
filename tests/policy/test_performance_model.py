"""The cost model: its closed form, and the order of its results."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.policy.performance_model import (
    autoregressive_seconds,
    expected_tokens,
    speculative_seconds,
    zero_latency_bound_seconds,
)

acceptances = st.floats(0.0, 1.0)
lookaheads = st.integers(1, 64)
draft_times = st.floats(1e-4, 1.0)
base_times = st.floats(1e-3, 1.0)
row_times = st.floats(0.0, 0.1)


def linear_pass(base: float, row: float) -> Callable[[int], float]:
    return lambda num_proposed: base + row * num_proposed


@given(acceptances, st.integers(0, 64))
def test_expected_tokens_is_the_sum_over_positions(acceptance: float, lookahead: int) -> None:
    probabilities = (acceptance**index for index in range(lookahead + 1))
    assert expected_tokens(acceptance, lookahead) == pytest.approx(sum(probabilities), rel=1e-6)


@pytest.mark.parametrize(
    ("acceptance", "lookahead", "tokens"),
    [(0.0, 5, 1.0), (1.0, 5, 6.0), (0.5, 1, 1.5), (0.5, 2, 1.75), (0.8, 0, 1.0)],
)
def test_expected_tokens_of_known_cases(acceptance: float, lookahead: int, tokens: float) -> None:
    assert expected_tokens(acceptance, lookahead) == pytest.approx(tokens)


def test_expected_tokens_agrees_with_a_simulation() -> None:
    rng = random.Random(1)
    num_passes, total = 20_000, 0
    for _ in range(num_passes):
        run = 0
        while run < 4 and rng.random() < 0.7:
            run += 1
        total += run + 1
    assert total / num_passes == pytest.approx(expected_tokens(0.7, 4), rel=0.02)


def test_speculative_time_is_the_sum_of_draft_and_pass() -> None:
    seconds = speculative_seconds(1.0, 4, draft_seconds=0.01, pass_seconds=linear_pass(0.06, 0.0))
    assert seconds == pytest.approx((0.04 + 0.06) / 5)


def test_the_bound_is_limited_by_what_the_draft_writes_during_a_pass() -> None:
    # In a pass of 60 ms, a draft with steps of 20 ms writes three tokens.
    seconds = zero_latency_bound_seconds(1.0, 0.02, linear_pass(0.06, 0.0))
    assert seconds == pytest.approx(0.06 / 4)


def test_the_bound_checks_fewer_tokens_if_rows_cost_more_than_they_yield() -> None:
    seconds = zero_latency_bound_seconds(0.5, 0.001, linear_pass(0.02, 0.02))
    assert seconds == pytest.approx(0.02)


@given(acceptances, draft_times, base_times, row_times)
def test_autoregressive_decoding_does_not_beat_the_bound(
    acceptance: float, draft: float, base: float, row: float
) -> None:
    seconds = linear_pass(base, row)
    assert zero_latency_bound_seconds(acceptance, draft, seconds) <= autoregressive_seconds(seconds)


@given(acceptances, lookaheads, draft_times, base_times, row_times)
def test_speculative_decoding_does_not_beat_the_bound(
    acceptance: float, lookahead: int, draft: float, base: float, row: float
) -> None:
    seconds = linear_pass(base, row)
    bound = zero_latency_bound_seconds(acceptance, draft, seconds)
    speculative = speculative_seconds(acceptance, lookahead, draft, seconds)
    assert bound <= speculative * (1 + 1e-9)


@given(acceptances, draft_times, base_times)
def test_a_faster_draft_never_raises_the_bound(
    acceptance: float, draft: float, base: float
) -> None:
    seconds = linear_pass(base, 0.0)
    slow = zero_latency_bound_seconds(acceptance, draft, seconds)
    assert zero_latency_bound_seconds(acceptance, draft / 2, seconds) <= slow
