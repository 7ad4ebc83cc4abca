"""How likely proposals are accepted: by probability where it is known, and else by place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.policy.calibration import Calibration
from amusd.policy.place_acceptance import PlaceAcceptance
from amusd.policy.proposal_chances import SHARED_RATE, ProposalChances
from amusd.protocol.events import Verdict
from amusd.protocol.verify_session import Compared


def fresh() -> ProposalChances:
    return ProposalChances(Calibration(SHARED_RATE))


def passed(chances: ProposalChances, *compared: Compared, epoch: int, position: int) -> None:
    """Let a pass compare proposals and check all of them."""
    num_right = sum(one.is_right for one in compared)
    chances.observe(Verdict(epoch, position, len(compared), num_right, 1), compared)


@given(st.lists(st.floats(0.0, 1.0), max_size=30))
def test_chances_are_probabilities_that_never_rise(probabilities: list[float]) -> None:
    chances = fresh().chances(probabilities)
    assert len(chances) == len(probabilities)
    assert all(0.0 <= chance < 1.0 for chance in chances)
    assert chances == sorted(chances, reverse=True)


def test_at_first_a_chance_is_the_product_of_the_probabilities() -> None:
    assert fresh().chances([0.9, 0.5, 0.8]) == pytest.approx([0.9, 0.45, 0.36])


def test_without_probabilities_the_chances_are_those_of_the_places() -> None:
    chances, places = fresh(), PlaceAcceptance()
    for epoch in range(20):
        verdict = Verdict(epoch, 5 + 2 * epoch, 3, 1, 1)
        compared = (Compared(0.0, is_right=True), Compared(0.0, is_right=False))
        chances.observe(verdict, compared)
        places.observe(verdict)
    assert chances.chances([0.0] * 4) == places.chances(4)


def test_an_unknown_probability_among_known_ones_counts_by_its_place() -> None:
    assert fresh().chances([0.5, 0.0, 0.5]) == pytest.approx([0.5, 0.5 * 0.6, 0.25 * 0.6])


def test_what_the_model_gets_wrong_does_not_count_against_a_lookup() -> None:
    chances, position = fresh(), 5
    for epoch in range(100):
        passed(chances, Compared(0.6, is_right=False), epoch=2 * epoch, position=position)
        right = Compared(0.0, is_right=True)
        passed(chances, right, right, epoch=2 * epoch + 1, position=position + 1)
        position += 4
    chances.rejected(1000)
    assert chances.chances([0.0])[0] > 0.85
    assert chances.chances([0.6])[0] < 0.25


def test_a_session_begins_with_what_other_sessions_have_taught() -> None:
    shared = Calibration(SHARED_RATE)
    first = ProposalChances(shared)
    for epoch in range(300):
        passed(first, Compared(0.9, is_right=False), epoch=epoch, position=5 + epoch)
    assert ProposalChances(shared).chances([0.9])[0] < 0.3
