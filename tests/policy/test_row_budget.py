"""How the rows of a verify pass are divided between its sessions."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.policy.row_budget import MAX_ROWS, RowBudget


def budget(base_seconds: float, row_seconds: float, num_rows: int = 128) -> RowBudget:
    """Return a budget that knows passes of so many seconds, and more for each row."""
    known = RowBudget()
    for rows in range(1, num_rows + 1):
        for _ in range(30):
            known.observe(rows, base_seconds + rows * row_seconds)
    return known


chances_of_sessions = st.lists(
    st.lists(st.floats(0.01, 0.99), max_size=3).map(lambda found: sorted(found, reverse=True)),
    min_size=1,
    max_size=3,
)


def rate(known: RowBudget, chances: list[list[float]], allotted: list[int], others: int) -> float:
    tokens = len(chances) + sum(
        sum(found[:number]) for found, number in zip(chances, allotted, strict=True)
    )
    seconds = known.times.pass_seconds(len(chances) + others + sum(allotted))
    assert seconds is not None
    return tokens / seconds


@given(chances_of_sessions, st.floats(0.0, 0.02), st.integers(0, 3))
def test_no_other_division_yields_more_tokens_a_second(
    chances: list[list[float]], row_seconds: float, num_others: int
) -> None:
    known = RowBudget()
    for rows in range(1, 16):
        known.observe(rows, 0.02 + rows * row_seconds)
    allotted = known.allot(chances, num_others)
    best = max(
        rate(known, chances, list(other), num_others)
        for other in itertools.product(*(range(len(found) + 1) for found in chances))
    )
    assert rate(known, chances, allotted, num_others) == pytest.approx(best)


def test_free_rows_are_all_used() -> None:
    assert budget(0.02, 0.0).allot([[0.9, 0.5, 0.1], [0.3]]) == [3, 1]


def test_rows_that_cost_as_much_as_their_tokens_are_not_used() -> None:
    assert budget(0.0, 0.01).allot([[0.9, 0.8]] * 8) == [0] * 8


def test_the_most_promising_proposals_come_first() -> None:
    known = budget(0.02, 0.005)
    allotted = known.allot([[0.9, 0.8, 0.7], [0.2, 0.1], [0.9, 0.3]])
    assert allotted[0] >= allotted[2] >= allotted[1] == 0


def test_the_more_sessions_the_fewer_proposals_of_each() -> None:
    known = budget(0.02, 0.003)
    run = [0.8**place for place in range(1, 9)]
    numbers = [sum(known.allot([run] * sessions)) / sessions for sessions in (1, 2, 4, 8, 16)]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] > 2 * numbers[-1]


def test_before_any_pass_is_timed_nothing_is_held_back() -> None:
    assert RowBudget().allot([[0.1] * 5, []]) == [5, 0]


def test_at_most_so_many_proposals_are_weighed() -> None:
    assert sum(budget(0.02, 0.0, 8).allot([[0.9] * 64] * 16)) == MAX_ROWS
