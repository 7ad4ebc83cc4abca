"""Calibration of a draft's own probabilities."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.policy.calibration import Calibration

outcomes = st.lists(st.tuples(st.floats(0.0, 1.0), st.booleans()), max_size=60)
PROBABILITIES = (0.05, 0.2, 0.5, 0.8, 0.95)


def learned(found: list[tuple[float, bool]], rate: float = 0.05) -> Calibration:
    calibration = Calibration(rate)
    for probability, is_right in found:
        calibration.observe(probability, is_right)
    return calibration


def taught(share_right: dict[float, float], num_tokens: int = 4000) -> Calibration:
    """Return a calibration after tokens that are right as often as stated."""
    draws = random.Random(3)
    stated = [draws.choice(list(share_right)) for _ in range(num_tokens)]
    return learned([(one, draws.random() < share_right[one]) for one in stated])


@given(outcomes, st.lists(st.floats(0.0, 1.0), min_size=2, max_size=20))
def test_a_likelier_token_has_no_lower_chance(
    found: list[tuple[float, bool]], probabilities: list[float]
) -> None:
    calibration = learned(found)
    chances = [calibration.chance(one) for one in sorted(probabilities)]
    assert chances == sorted(chances)
    assert all(0.0 < chance < 1.0 for chance in chances)


def test_at_first_the_drafts_own_probabilities_hold() -> None:
    for probability in PROBABILITIES:
        assert Calibration(0.05).chance(probability) == pytest.approx(probability)


def test_a_calibrated_draft_stays_as_it_is() -> None:
    calibration = taught({one: one for one in PROBABILITIES})
    for probability in PROBABILITIES:
        assert calibration.chance(probability) == pytest.approx(probability, abs=0.1)


def test_an_overconfident_draft_is_believed_less() -> None:
    shares = {0.05: 0.02, 0.2: 0.05, 0.5: 0.15, 0.8: 0.35, 0.95: 0.6}
    calibration = taught(shares)
    for probability, share in shares.items():
        assert calibration.chance(probability) == pytest.approx(share, abs=0.12)


def test_probabilities_that_say_nothing_become_the_mean() -> None:
    calibration = taught(dict.fromkeys(PROBABILITIES, 0.6))
    for probability in PROBABILITIES:
        assert calibration.chance(probability) == pytest.approx(0.6, abs=0.15)


def test_a_draft_that_changes_is_followed() -> None:
    calibration = taught(dict.fromkeys(PROBABILITIES, 0.95))
    for _ in range(300):
        calibration.observe(0.8, False)
    assert calibration.chance(0.8) < 0.2


def test_another_calibration_begins_with_what_is_known_and_learns_alone() -> None:
    first = taught({0.8: 0.3})
    second = first.begin(0.5)
    before = first.chance(0.8)
    assert second.chance(0.8) == before
    second.observe(0.8, True)
    assert second.chance(0.8) > before == first.chance(0.8)
