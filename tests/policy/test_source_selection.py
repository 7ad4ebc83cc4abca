"""When a draft source pays, and when it is switched off."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.policy.source_selection import SourceTracker
from amusd.protocol.draft_source import ALL_SOURCES, DraftSource

MODEL, LOOKUP = DraftSource.MODEL, DraftSource.LOOKUP
outcomes = st.lists(st.tuples(st.sampled_from(DraftSource), st.booleans()), max_size=120)


def tracked(model: tuple[int, int] = (0, 0), lookup: tuple[int, int] = (0, 0)) -> SourceTracker:
    """Return a tracker after the given numbers of (right, wrong) tokens of each source."""
    tracker = SourceTracker()
    for source, (num_right, num_wrong) in ((MODEL, model), (LOOKUP, lookup)):
        for index in range(num_right + num_wrong):
            tracker.compared(source, is_right=index < num_right)
    return tracker


def test_without_counts_every_source_pays() -> None:
    assert SourceTracker().paying == ALL_SOURCES


@pytest.mark.parametrize(("num_wrong", "pays"), [(7, True), (8, False)])
def test_lookup_that_is_never_right_is_off_after_eight_tokens(num_wrong: int, pays: bool) -> None:
    assert tracked(lookup=(0, num_wrong)).pays(LOOKUP) is pays


def test_lookup_must_be_right_as_often_as_the_model() -> None:
    assert not tracked(model=(30, 10), lookup=(12, 8)).pays(LOOKUP)
    assert tracked(model=(20, 20), lookup=(12, 8)).pays(LOOKUP)


def test_lookup_that_is_as_good_as_the_model_pays() -> None:
    assert tracked(model=(12, 8), lookup=(12, 8)).pays(LOOKUP)


def test_lookup_comes_back_when_the_model_gets_worse() -> None:
    tracker = tracked(model=(10, 0), lookup=(5, 5))
    assert not tracker.pays(LOOKUP)
    for _ in range(20):
        tracker.compared(MODEL, is_right=False)
    assert tracker.pays(LOOKUP)


@pytest.mark.parametrize(
    ("model", "pays"), [((0, 47), True), ((0, 48), False), ((2, 46), False), ((3, 45), True)]
)
def test_a_model_that_is_rarely_right_is_off_after_48_tokens(
    model: tuple[int, int], pays: bool
) -> None:
    assert tracked(model=model).pays(MODEL) is pays


def test_if_both_are_rarely_right_no_source_pays() -> None:
    assert tracked(model=(0, 60), lookup=(0, 70)).paying == frozenset()


@given(outcomes)
def test_every_comparison_counts_for_its_source(
    compared: list[tuple[DraftSource, bool]],
) -> None:
    tracker = SourceTracker()
    for source, is_right in compared:
        tracker.compared(source, is_right)
    for source in DraftSource:
        outcomes_of_source = [is_right for one, is_right in compared if one is source]
        counts = tracker.counts[source]
        expected = (len(outcomes_of_source), sum(outcomes_of_source))
        assert (counts.num_checked, counts.num_accepted) == expected
        assert 0.0 < counts.smoothed_acceptance < 1.0


@given(outcomes, st.sampled_from(DraftSource))
def test_a_right_token_never_switches_its_source_off(
    compared: list[tuple[DraftSource, bool]], source: DraftSource
) -> None:
    tracker = SourceTracker()
    for one, is_right in compared:
        tracker.compared(one, is_right)
    if tracker.pays(source) and tracker.counts[source].num_checked >= 48:
        tracker.compared(source, is_right=True)
        assert tracker.pays(source)


@given(outcomes)
def test_counts_of_lookup_do_not_affect_the_model(
    compared: list[tuple[DraftSource, bool]],
) -> None:
    model_only, both = SourceTracker(), SourceTracker()
    for source, is_right in compared:
        both.compared(source, is_right)
        if source is MODEL:
            model_only.compared(source, is_right)
    assert model_only.pays(MODEL) == both.pays(MODEL)
