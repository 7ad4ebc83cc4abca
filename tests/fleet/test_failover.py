"""Which sessions that a replica has ended are opened on another one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.fleet.failover import Attempts, Ending


def num_tried(endings: list[Ending]) -> int:
    """Return how many replicas a session visits that ends like this on one after the other."""
    attempts = Attempts()
    for number, ending in enumerate(endings):
        if not attempts.may_move(f"replica {number}", ending):
            return number + 1
    return len(endings)


@pytest.mark.parametrize(
    ("ending", "num_allowed"),
    [(Ending.REFUSED, 4), (Ending.FAILED, 2), (Ending.UNKNOWN, 4), (Ending.FINAL, 1)],
)
def test_the_number_of_tries_depends_on_how_they_end(ending: Ending, num_allowed: int) -> None:
    assert num_tried([ending] * 9) == num_allowed


@given(st.lists(st.sampled_from(Ending), min_size=9))
def test_no_session_fails_on_a_third_replica(endings: list[Ending]) -> None:
    tried = endings[: num_tried(endings)]
    assert tried.count(Ending.FAILED) <= 2
    assert tried.count(Ending.FINAL) <= 1
    assert len(tried) <= 4


def test_a_failure_after_a_lost_status_may_be_the_second_one() -> None:
    assert num_tried([Ending.UNKNOWN, Ending.FAILED, Ending.FAILED]) == 2


def test_only_a_replica_that_has_told_its_reason_is_avoided() -> None:
    attempts = Attempts()
    for address, ending in (("a", Ending.UNKNOWN), ("b", Ending.REFUSED), ("c", Ending.FAILED)):
        attempts.may_move(address, ending)
    assert attempts.avoided == {"b", "c"}
