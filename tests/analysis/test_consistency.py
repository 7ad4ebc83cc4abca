"""Comparison of outputs that should be identical."""

import pytest

from amusd.analysis.consistency import Comparison, Difference, Tie, differences, first_difference


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
def test_the_first_token_that_differs_counts(
    expected: tuple[int, ...], found: tuple[int, ...], difference: Difference | None
) -> None:
    assert first_difference(7, expected, found) == difference


def test_repeated_prompts_are_compared_with_the_same_reference() -> None:
    reference = [(1, 2), (3, 4)]
    outputs = [(1, 2), (3, 4), (1, 9), (3, 4), (1, 2), (8, 4)]
    assert list(differences(reference, outputs)) == [Difference(0, 1, 2, 9), Difference(1, 0, 3, 8)]


def test_a_comparison_sums_up_its_differences() -> None:
    found = (
        Difference(0, 12, 1, 2, Tie(0.5, 0.125)),
        Difference(3, 4, 1, 2, Tie(-0.25, 0.25)),  # Transformers rounds the other way
        Difference(4, 30, 1, -1),
    )
    comparison = Comparison("fast", "amusd", 8, 10, found)
    assert comparison.indices == (4, 12)
    assert comparison.gaps == (0.25, 0.5)
    assert comparison.spacings == (1.0, 4.0)
    report = comparison.report()
    assert (report["num_outputs"], report["num_differing"]) == (10, 3)
    assert (report["first_index"], report["median_index"]) == (4, 12)
    assert report["gaps"] == (0.25, 0.5)
    assert report["differences"][0]["tie"] == {"gap": 0.5, "spacing": 0.125, "num_spacings": 4.0}
    assert report["differences"][2]["tie"] is None


def test_without_differences_there_is_nothing_to_sum_up() -> None:
    comparison = Comparison("exact", "amusd", 8, 10, ())
    assert comparison.indices is None
    assert comparison.gaps is None
    assert comparison.spacings is None
    assert comparison.report()["first_index"] is None
