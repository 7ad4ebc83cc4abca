"""Which token of which branch is drafted next."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.policy.branch_selection import BranchSelection, Candidate, Choice

probabilities = st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3).map(tuple)
runs = st.lists(probabilities, min_size=1, max_size=10)


def selection_of(run: list[tuple[float, ...]], start: int = 0) -> BranchSelection:
    """A selection whose run has a token and next-best ones of these probabilities."""
    selection = BranchSelection(start)
    for position, chances in enumerate(run, start):
        alternatives = tuple(range(7, 7 + len(chances) - 1))
        selection.add(position, Choice(alternatives, chances))
    return selection


def drain(selection: BranchSelection) -> list[Candidate]:
    found = []
    while selection.best(0) is not None:
        found.append(selection.take_best())
    return found


def test_without_branches_there_is_none() -> None:
    assert BranchSelection(0).best(0) is None


@given(runs)
def test_the_best_comes_first(run: list[tuple[float, ...]]) -> None:
    costs = [one.cost for one in drain(selection_of(run))]
    assert costs == sorted(costs)
    assert len(costs) == 2 * len(run)


def test_the_cost_is_that_of_the_outcome() -> None:
    found = drain(selection_of([(0.5, 0.3), (0.8, 0.1)], start=4))
    assert [(one.position, one.token) for one in found] == [(4, 7), (5, 7)]
    assert [math.exp(-one.cost) for one in found] == pytest.approx([0.3, 0.5 * 0.1])


def test_a_second_choice_here_can_be_worth_more_than_a_first_choice_far_ahead() -> None:
    found = drain(selection_of([(0.6, 0.3, 0.1), (0.5, 0.16, 0.01)]))
    assert [(one.position, one.token) for one in found[:3]] == [(0, 7), (0, 8), (1, 7)]


def test_a_branch_grows_until_the_first_token_of_another_is_likelier_of_use() -> None:
    selection = selection_of([(0.5, 0.3, 0.2)])
    branch, other = selection.take_best(), selection.best(0)
    assert other is not None
    branch = selection.next_of(branch, 0.9)
    assert (branch.depth, branch.cost < other.cost) == (1, True)
    branch = selection.next_of(branch, 0.6)
    assert (branch.depth, branch.cost < other.cost) == (2, False)
    selection.put_back(branch)
    assert selection.take_best() == other


@given(runs)
def test_decided_branches_are_forgotten(run: list[tuple[float, ...]]) -> None:
    selection = selection_of(run)
    assert selection.best(len(run)) is None
    assert not drain(selection)


def test_a_token_that_is_hardly_ever_used_is_not_worth_drafting() -> None:
    selection = selection_of([(0.5, 0.4)] * 20)
    found = drain(selection)
    assert [selection.is_worth(one, 0) for one in found] == [True] * 9 + [False] * 11
    assert all(selection.is_worth(one, 15) for one in found if one.position >= 15)


def test_tokens_that_the_model_did_not_write_lie_before_what_it_writes() -> None:
    selection = BranchSelection(3)
    selection.add(5, Choice((7,), (0.9, 0.1)))
    [branch] = drain(selection)
    assert branch.cost > -math.log(0.1)


def test_another_epoch_begins_without_branches() -> None:
    selection = selection_of([(0.5, 0.3)] * 4)
    selection.restart(9)
    assert selection.best(0) is None
    selection.add(9, Choice((7,), (0.5, 0.25)))
    [branch] = drain(selection)
    assert math.exp(-branch.cost) == pytest.approx(0.25)
