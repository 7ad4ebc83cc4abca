"""Comparing outputs that should be the same."""

import pytest

from amusd.core.consistency import Comparison, Difference, first_difference


@pytest.mark.parametrize(
    ("expected", "found", "difference"),
    [
        ((1, 2, 3), (1, 2, 3), None),
        ((), (), None),
        ((1, 2, 3), (1, 5, 3), Difference(7, 1, 2, 5)),
        ((1, 2, 3), (1, 2), Difference(7, 2, 3, -1)),
        ((1,), (1, 2), Difference(7, 1, -1, 2)),
    ],
)
def test_the_first_place_that_differs_counts(
    expected: tuple[int, ...], found: tuple[int, ...], difference: Difference | None
) -> None:
    assert first_difference(7, expected, found) == difference


def test_a_comparison_sums_up_its_differences() -> None:
    differences = (
        Difference(0, 12, 1, 2, 0.5),
        Difference(3, 4, 1, 2, 0.125),
        Difference(4, 30, 1, -1),
    )
    comparison = Comparison("fast", "amusd", 8, 10, differences)
    assert comparison.places == (4, 12)
    assert comparison.gaps == (0.125, 0.5)


def test_without_differences_there_is_nothing_to_sum_up() -> None:
    comparison = Comparison("exact", "amusd", 8, 10, ())
    assert comparison.places is None
    assert comparison.gaps is None
