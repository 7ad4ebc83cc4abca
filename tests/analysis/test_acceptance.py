import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.analysis.acceptance import Predictor, acceptance_per_position, share_of_hits
from amusd.analysis.generation_statistics import PositionAcceptance
from amusd.policy.performance_model import expected_tokens, speculative_seconds

HITS = st.lists(st.lists(st.booleans(), min_size=1, max_size=40), min_size=1, max_size=8)


def test_the_share_is_of_tokens_not_of_answers() -> None:
    share = share_of_hits([[True] * 9, [False]])
    assert share.value == pytest.approx(0.9)
    assert share.num_tokens == 10


def test_the_interval_of_one_answer_is_0_to_1() -> None:
    share = share_of_hits([[True, False, True, True]])
    assert (share.low, share.high) == (0.0, 1.0)


def test_the_interval_covers_the_true_share_in_95_of_100_cases() -> None:
    """Answers have different acceptance, which a binomial interval would ignore."""
    rng = random.Random(0)
    covered = 0
    for _ in range(400):
        answers = []
        for _ in range(30):
            ease = rng.uniform(0.2, 0.8)
            answers.append([rng.random() < ease for _ in range(100)])
        share = share_of_hits(answers)
        covered += share.low <= 0.5 <= share.high
    assert 0.91 <= covered / 400 <= 0.98


def test_positions_are_counted_as_passes_would() -> None:
    # Passes of three: TTF, then F, then TT at the end.
    hits = [True, True, False, False, True, True]
    assert acceptance_per_position([hits], 3) == (
        PositionAcceptance(3, 2),
        PositionAcceptance(2, 2),
        PositionAcceptance(1, 0),
    )


@given(HITS, st.integers(1, 6))
def test_every_token_is_accepted_or_the_verify_models_own(
    answers: list[list[bool]], lookahead: int
) -> None:
    positions = acceptance_per_position(answers, lookahead)
    num_accepted = sum(position.num_accepted for position in positions)
    num_passes = positions[0].num_checked
    # The last pass of an answer may end with an accepted token.
    assert 0 <= num_accepted + num_passes - sum(map(len, answers)) <= len(answers)
    for position, following in itertools.pairwise(positions):
        assert following.num_checked <= position.num_accepted <= position.num_checked


@given(st.floats(0.05, 0.95), st.integers(1, 5))
def test_equal_positions_give_the_times_of_the_formula(acceptance: float, size: int) -> None:
    positions = (PositionAcceptance(10_000, round(10_000 * acceptance)),) * size
    rate = positions[0].num_accepted / positions[0].num_checked
    predictor = Predictor(positions, 0.004, lambda n: 0.05 + 0.005 * n, message_seconds=0.0)
    found = predictor.speculative()
    expected = speculative_seconds(rate, found.num_proposed, 0.004, lambda n: 0.05 + 0.005 * n)
    assert found.seconds == pytest.approx(expected)


def test_asynchronous_decoding_hides_the_draft_where_nothing_is_rejected() -> None:
    sure = (PositionAcceptance(100, 100),) * 4
    predictor = Predictor(sure, 0.005, lambda n: 0.05, message_seconds=0.0)
    assert predictor.asynchronous().seconds == pytest.approx(0.05 / 5)
    assert predictor.speculative().seconds == pytest.approx((0.05 + 4 * 0.005) / 5)


def test_asynchronous_decoding_is_bound_by_the_drafts_own_rate() -> None:
    sure = (PositionAcceptance(100, 100),) * 4
    predictor = Predictor(sure, 0.04, lambda n: 0.05)
    assert predictor.asynchronous().seconds == pytest.approx(0.04)


def test_a_useless_draft_leaves_autoregressive_decoding() -> None:
    never = (PositionAcceptance(100, 0),) * 4
    found = Predictor(never, 0.005, lambda n: 0.05 + 0.001 * n).asynchronous()
    assert (found.seconds, found.num_proposed) == (0.05, 0)


@given(st.floats(0.1, 0.9))
def test_a_rejection_costs_the_refill(acceptance: float) -> None:
    positions = (PositionAcceptance(1000, round(1000 * acceptance)),)
    rate = positions[0].num_accepted / 1000
    found = Predictor(positions, 0.01, lambda n: 0.05 if n else 10.0, 0.0).asynchronous()
    cycle = 0.05 + (1 - rate) * 1.5 * 0.01
    assert math.isclose(found.seconds, cycle / expected_tokens(rate, 1))
