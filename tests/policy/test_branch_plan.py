"""The branches of a draft session: which are drafted, and when they are sent."""

import pytest

from amusd.policy.branch_plan import BranchCounts, BranchPlan
from amusd.policy.branch_selection import Choice
from amusd.protocol.draft_limits import DraftLimits
from amusd.protocol.draft_session import DraftSession
from amusd.protocol.events import Branch


class Bench:
    """A session whose run is written already, and the plan of its branches."""

    def __init__(self, *chances: tuple[float, ...], tokens_per_proposal: int = 1) -> None:
        limits = DraftLimits(8, 40, tokens_per_proposal, max_branches=16)
        self.session = DraftSession([1, 2], limits)
        self.counts = BranchCounts()
        self.plan = BranchPlan(self.session, self.counts)
        for position, probabilities in enumerate(chances, 2):
            self.session.extend((90,))
            others = tuple(range(10, 9 + len(probabilities)))
            self.plan.wrote(position, Choice(others, probabilities))
        self.session.take_run()

    def sent(self) -> list[Branch]:
        run = self.session.take_run()
        return list(run.branches) if run is not None else []


SURE = Choice((50, 51), (0.9, 0.06, 0.04))


def test_the_likeliest_outcome_is_drafted_first_and_sent_as_it_grows() -> None:
    bench = Bench((0.6, 0.3, 0.1), (0.9, 0.05, 0.05))
    branch = bench.plan.next_branch()
    assert branch is not None
    assert (branch.position, branch.token) == (2, 10)
    branch = bench.plan.grew(branch, 7, SURE)
    bench.plan.hand_over()
    assert bench.sent() == [Branch(2, 10, (7,), probabilities=(0.9,))]
    bench.plan.grew(branch, 8, SURE)
    bench.plan.hand_over()
    assert bench.sent() == [Branch(2, 10, (7, 8), probabilities=(0.9, 0.9))]
    assert (bench.counts.prepared, bench.counts.tokens) == (1, 2)


def test_a_branch_that_gives_way_goes_on_where_it_was() -> None:
    bench = Bench((0.5, 0.3, 0.2))
    first = bench.plan.next_branch()
    assert first is not None
    first = bench.plan.grew(first, 7, Choice((), (0.1,)))  # what follows is hardly ever used
    assert not bench.plan.goes_on(first)
    second = bench.plan.next_branch()
    assert second is not None
    assert second.token == 11
    again = bench.plan.next_branch()
    assert again == first
    assert bench.plan.tokens_of(again) == [7]


def test_a_branch_that_is_decided_or_too_long_ends() -> None:
    bench = Bench((0.5, 0.3))
    branch = bench.plan.next_branch()
    assert branch is not None
    while bench.plan.goes_on(branch):
        branch = bench.plan.grew(branch, 7, SURE)
    assert branch.depth == 8  # the look-ahead
    bench.session.advance(0, 2, (90,))
    assert bench.plan.next_branch() is None


@pytest.mark.parametrize("steps", [1, 3])
def test_branches_alone_are_sent_as_often_as_proposals_of_the_run(steps: int) -> None:
    bench = Bench((0.5, 0.3), (0.5, 0.3), (0.5, 0.3), tokens_per_proposal=steps)
    branch = bench.plan.next_branch()
    assert branch is not None
    bench.plan.grew(branch, 7, SURE)
    for _ in range(steps):
        assert not bench.plan.is_overdue
        bench.plan.num_unsent_steps += 1
    assert bench.plan.is_overdue
    bench.plan.hand_over()
    assert not bench.plan.is_overdue


def test_after_a_rollback_the_branches_behind_the_taken_one_come_first() -> None:
    bench = Bench((0.5, 0.3), (0.5, 0.3))
    branch = bench.plan.next_branch()
    assert branch is not None
    branch = bench.plan.grew(branch, 7, SURE)
    bench.plan.grew(branch, 8, SURE)
    bench.plan.before_rollback(2, 10)
    bench.session.rollback(1, 3, 10)
    bench.plan.after_rollback()
    assert bench.session.tokens == [1, 2, 10, 7, 8]
    following = bench.plan.next_branch()
    assert following is not None
    assert (following.position, following.token, following.depth) == (3, 50, 0)
    assert bench.counts.rollback_hits == 1


def test_after_a_rollback_to_another_outcome_nothing_is_left() -> None:
    bench = Bench((0.5, 0.3))
    branch = bench.plan.next_branch()
    assert branch is not None
    bench.plan.grew(branch, 7, SURE)
    bench.plan.before_rollback(2, 33)
    bench.session.rollback(1, 3, 33)
    bench.plan.after_rollback()
    assert bench.plan.next_branch() is None
    assert bench.counts.rollback_hits == 0
