"""Acceptance by place since the last rejection."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.policy.place_acceptance import PlaceAcceptance
from amusd.protocol.events import Verdict


@st.composite
def verdicts(draw: st.DrawFn) -> list[Verdict]:
    """Verdicts of one session, in order."""
    found, epoch, position = [], 0, 5
    for _ in range(draw(st.integers(0, 30))):
        num_checked = draw(st.integers(0, 8))
        num_accepted = draw(st.integers(0, num_checked))
        found.append(Verdict(epoch, position, num_checked, num_accepted, 1))
        position += num_accepted + 1
        epoch += num_accepted < num_checked
    return found


def learned(of: list[Verdict]) -> PlaceAcceptance:
    places = PlaceAcceptance()
    for verdict in of:
        places.observe(verdict)
    return places


@given(verdicts(), st.integers(0, 40))
def test_chances_are_probabilities_that_never_rise(of: list[Verdict], number: int) -> None:
    chances = learned(of).chances(number)
    assert len(chances) == number
    assert all(0.0 < chance < 1.0 for chance in chances)
    assert chances == sorted(chances, reverse=True)


@given(verdicts())
def test_after_a_rejection_the_chances_are_those_of_the_first_places(of: list[Verdict]) -> None:
    places = learned(of)
    places.rejected(100)
    first = places.chances(8)
    position = of[-1].position + of[-1].num_accepted + 1 if of else 0
    places.observe(Verdict(100, position, 0, 0, 1))  # a pass that compares nothing
    places.rejected(101)
    assert places.chances(8) == first


def test_a_first_place_that_is_often_wrong_lowers_only_the_first_places() -> None:
    position, epoch, found = 5, 0, []
    for number in range(200):
        # The first token after a rejection is right every other time, all later ones are right.
        is_right = number % 2 == 0
        if is_right:
            found.append(Verdict(epoch, position, 8, 8, 1))
            position += 9
            found.append(Verdict(epoch, position, 8, 8, 1))
            position += 9
            places = learned(found)
            places.rejected(epoch + 1)
            found.append(Verdict(epoch, position, 0, 0, 1))
            position += 1
            epoch += 1
        else:
            found.append(Verdict(epoch, position, 1, 0, 1))
            position += 1
            epoch += 1
    places = learned(found)
    places.rejected(epoch)
    first = places.chances(1)[0]
    assert first == pytest.approx(0.5, abs=0.15)
    assert places.late_acceptance > 0.9


def test_without_verdicts_the_prior_holds_at_every_place() -> None:
    chances = PlaceAcceptance().chances(3)
    assert chances == pytest.approx([0.6, 0.36, 0.216])
