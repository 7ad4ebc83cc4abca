"""Which token of which branch is drafted next."""

from hypothesis import given
from hypothesis import strategies as st

from amusd.policy.branch_selection import BranchSelection, Candidate, RankOdds

acceptances = st.floats(0.0, 1.0)
positions = st.lists(st.integers(0, 30), min_size=1, max_size=10, unique=True)


def drain(selection: BranchSelection) -> list[Candidate]:
    found = []
    while selection.best(0) is not None:
        found.append(selection.take_best())
    return found


def test_without_branches_there_is_none() -> None:
    assert BranchSelection().best(0) is None


@given(acceptances, positions)
def test_the_best_comes_first(acceptance: float, places: list[int]) -> None:
    selection = BranchSelection()
    selection.restart(acceptance)
    for position in places:
        selection.add(position, (7, 8, 9))
    costs = [one.cost for one in drain(selection)]
    assert costs == sorted(costs)
    assert len(costs) == 3 * len(places)


def test_a_second_choice_here_can_be_worth_more_than_a_first_choice_far_ahead() -> None:
    selection = BranchSelection()
    selection.restart(0.75)
    selection.add(16, (5,))
    selection.add(10, (6, 7))
    assert [(one.position, one.token) for one in drain(selection)] == [(10, 6), (10, 7), (16, 5)]


def test_a_branch_grows_until_the_first_token_of_another_is_likelier_of_use() -> None:
    selection = BranchSelection()
    selection.restart(0.5)
    selection.add(4, (6, 7))
    branch, other = selection.take_best(), selection.best(0)
    assert other is not None
    while branch.cost < other.cost:
        branch = selection.next_of(branch)
    assert branch.depth == 1  # a token more halves the chance, as the second rank does
    selection.put_back(selection.next_of(branch))
    assert selection.take_best() == other


@given(acceptances, st.integers(1, 40))
def test_decided_branches_are_forgotten(acceptance: float, verified: int) -> None:
    selection = BranchSelection()
    selection.restart(acceptance)
    for position in range(verified):
        selection.add(position, (1, 2))
    assert selection.best(verified) is None
    assert not drain(selection)


def test_a_token_that_is_hardly_ever_used_is_not_worth_drafting() -> None:
    selection = BranchSelection()
    selection.restart(0.5)
    selection.add(10, (1,))
    selection.add(40, (2,))
    near, far = drain(selection)
    assert selection.is_worth(near, 10)
    assert not selection.is_worth(far, 10)
    assert selection.is_worth(far, 39)


def test_the_odds_of_a_rank_follow_what_was_rejected() -> None:
    odds = RankOdds()
    before = [odds.chance(rank) for rank in range(3)]
    assert before == sorted(before, reverse=True)
    for _ in range(100):
        odds.rejected(1)
        odds.rejected(None)
    assert odds.chance(1) > 0.4 > odds.chance(0)
    assert sum(odds.chance(rank) for rank in range(8)) <= 1.0
