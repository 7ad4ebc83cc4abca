"""Parameters of the performance model: interpolation and refusals."""

from collections.abc import Callable

import pytest

from amusd.performance.deployment import Branching, Deployment, MessageSeconds, StepSeconds
from amusd.protocol.errors import InvalidInputError


@pytest.mark.parametrize(
    ("num_tokens", "seconds"), [(1, 1.0), (2, 1.0), (4, 2.0), (3, 1.5), (8, 3.0), (16, 5.0)]
)
def test_step_times_are_interpolated_and_grow_beyond_the_largest_size(
    num_tokens: int, seconds: float
) -> None:
    assert StepSeconds((2, 4, 8), (1.0, 2.0, 3.0)).of(num_tokens) == pytest.approx(seconds)


def test_a_single_time_holds_for_every_size() -> None:
    assert StepSeconds.constant(0.5).of(100) == 0.5


def test_branch_ranks_halve_and_add_up() -> None:
    assert Branching.of_total(0.8).chances == pytest.approx((0.4, 0.2, 0.1, 0.1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StepSeconds((), ()), "at least one"),
        (lambda: StepSeconds((4, 2), (1.0, 2.0)), "ascending"),
        (lambda: StepSeconds((1, 2), (2.0, 1.0)), "cannot take less time"),
        (lambda: StepSeconds.constant(0.0), "above 0"),
        (lambda: StepSeconds.constant(float("nan")), "above 0"),
        (lambda: MessageSeconds(proposal=-1.0), "use 0 or more"),
        (lambda: Branching.of_total(1.5), "use 0 to 1"),
        (lambda: Branching((0.8, 0.8)), "add up to 0 to 1"),
        (lambda: Branching((0.5,), num_rows=0), "at least one row"),
        (lambda: _deployment((1.2,), 1), "use 0 to 1"),
        (lambda: _deployment((), 1), "acceptance is empty"),
        (lambda: _deployment((0.5,), 0), "num_sessions is 0"),
    ],
)
def test_values_out_of_range_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        make()


def _deployment(acceptance: tuple[float, ...], num_sessions: int) -> Deployment:
    step = StepSeconds.constant(1.0)
    return Deployment(step, step, acceptance, num_sessions=num_sessions)
