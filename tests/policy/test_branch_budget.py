"""How many branches a batch takes: all where rows are free, none where they cost too much."""

import pytest

from amusd.policy.branch_budget import BranchBudget, RowTimes

MOST = 8
BASE = 2e-3


def serve(
    budget: BranchBudget,
    row_cost: float,
    hit_chance: float,
    num_cycles: int = 40,
    num_runs: int = 1,
) -> list[int]:
    """Run cycles of 8 steps and a rollback for each session; return the places of each step.

    Each row beyond the first makes a step longer by the share ``row_cost``. Of the rollbacks, a
    share ``hit_chance`` has a branch if there were any.
    """
    found, hits = [], 0.0
    for _ in range(num_cycles):
        for _ in range(8):
            places = budget.places(num_runs)
            found.append(places)
            num_rows = num_runs + places
            budget.ran(num_rows, num_runs, BASE * (1 + row_cost * (num_rows - 1)))
        for _ in range(num_runs):
            hits += hit_chance if found[-1] else 0.0
            budget.rolled_back(hits >= 1.0)
            hits %= 1.0
    return found


@pytest.mark.parametrize("num_runs", [1, 4, 30])
@pytest.mark.parametrize("hit_chance", [0.0, 0.1, 0.8])
def test_where_rows_are_free_all_branches_are_drafted(hit_chance: float, num_runs: int) -> None:
    found = serve(BranchBudget(MOST), 0.0, hit_chance, num_runs=num_runs)
    assert found[0] == 0  # a step alone is measured first
    assert set(found[1:60]) == {MOST}
    assert found.count(MOST) > 0.98 * len(found)  # and seldom again


def test_rows_that_cost_little_against_the_messages_of_a_cycle_are_taken() -> None:
    budget = BranchBudget(MOST)
    for _ in range(20):
        num_rows = 1 + budget.places(1)
        budget.ran(num_rows, 1, 1e-6 * num_rows)
    assert budget.places(1) > MOST / 2  # although a step takes several times as long


def test_where_rows_cost_as_much_as_on_a_cpu_branches_end_after_the_first_batch() -> None:
    found = serve(BranchBudget(MOST), 0.15, 0.4)
    assert found[:2] == [0, MOST]  # what rows cost is not known yet
    assert set(found[2:60]) == {0}
    assert found.count(0) > 0.98 * len(found)


def test_a_prompt_shows_what_rows_cost_before_any_branch_is_drafted() -> None:
    budget = BranchBudget(MOST)
    budget.ran(64, 1, BASE * (1 + 0.15 * 63))
    budget.ran(1, 1, BASE)
    assert budget.places(1) == 0
    free = BranchBudget(MOST)
    free.ran(64, 1, BASE)
    free.ran(1, 1, BASE)
    assert free.places(1) == MOST


def test_branches_are_drafted_without_runs_although_these_always_step_together() -> None:
    budget = BranchBudget(MOST)
    budget.ran(4, 4, BASE)
    assert budget.places(0) == MOST


def test_cheap_rows_are_taken_as_far_as_they_pay() -> None:
    some = serve(BranchBudget(MOST), 0.015, 0.4)[-1]
    fewer = serve(BranchBudget(MOST), 0.025, 0.4)[-1]
    assert 0 < fewer < some < MOST


def test_branches_that_are_never_right_end_where_rows_cost_something() -> None:
    right = serve(BranchBudget(MOST), 0.03, 0.5, num_cycles=200)
    wrong = serve(BranchBudget(MOST), 0.03, 0.0, num_cycles=200)
    assert right[-1] > 0
    assert wrong[-1] == 0


def test_branches_that_did_not_pay_are_tried_again_but_seldom() -> None:
    found = serve(BranchBudget(MOST), 0.15, 0.4, num_cycles=2000)
    assert 0 < sum(1 for places in found[1:] if places) < len(found) / 1000


def test_rows_that_have_become_free_are_found() -> None:
    budget = BranchBudget(MOST)
    assert serve(budget, 0.15, 0.4)[-1] == 0
    assert serve(budget, 0.0, 0.4, num_cycles=400)[-1] == MOST


def test_one_late_batch_does_not_end_branches() -> None:
    budget = BranchBudget(MOST)
    serve(budget, 0.0, 0.4)
    budget.ran(1 + MOST, 1, 50 * BASE)
    serve(budget, 0.0, 0.4, num_cycles=3)
    assert budget.places(1) == MOST


def test_times_between_known_sizes_are_interpolated() -> None:
    times = RowTimes()
    assert times.seconds(3) == 0.0
    times.ran(2, 1.0)
    assert [times.seconds(rows) for rows in (1, 2, 9)] == [0.0, 1.0, 1.0]
    times.ran(6, 3.0)
    assert [times.seconds(rows) for rows in (1, 3, 4, 8)] == [0.0, 1.5, 2.0, 3.0]
    times.ran(25, 16.0)  # counts as 32 rows
    assert times.seconds(16) == pytest.approx(8.0)
    assert times.seconds(30) == 16.0


def test_a_time_is_an_average_of_the_last_batches() -> None:
    times = RowTimes()
    for seconds in (1.0, 2.0):
        times.ran(1, seconds)
    assert times.seconds(1) == pytest.approx(1.5)
    for _ in range(100):
        times.ran(1, 2.0)
    assert times.seconds(1) == pytest.approx(2.0, rel=1e-3)
