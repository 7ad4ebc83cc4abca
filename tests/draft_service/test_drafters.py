"""What a drafter is made of, and what n-gram lookup proposes: the laws of ``NgramProposer``."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from amusd.protocol.draft_source import DraftSource
from draft_service.drafters import Drafter, NgramProposer, model_drafter, ngram_drafter

MODEL, LOOKUP = DraftSource.MODEL, DraftSource.LOOKUP

laws = settings(deadline=None)
# Few different tokens, so that n-grams occur again.
texts = st.lists(st.integers(0, 2), min_size=1, max_size=30)


def looked_up(
    tokens: list[int], room: int = 4, min_match: int = 2, max_match: int = 4
) -> list[int]:
    """What a fresh proposer proposes."""
    return NgramProposer(min_match, max_match).propose("a", tokens, room)


def scanned(tokens: list[int], room: int, min_match: int = 2, max_match: int = 4) -> list[int]:
    """What n-gram lookup proposes, found by a slow scan."""
    for size in range(max_match, min_match - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if len(tokens) > size and tokens[end - size : end] == tokens[-size:]:
                return tokens[end : end + room]
    return []


# N-gram lookup


def test_what_followed_the_same_tokens_earlier_is_proposed() -> None:
    assert looked_up([1, 2, 3, 4, 5, 9, 1, 2]) == [3, 4, 5, 9]


def test_the_longest_match_counts() -> None:
    assert looked_up([1, 2, 3, 70, 9, 2, 3, 80, 9, 1, 2, 3], room=1) == [70]


def test_among_equal_matches_the_latest_counts() -> None:
    assert looked_up([1, 2, 70, 1, 2, 80, 1, 2], room=1) == [80]


def test_a_match_shorter_than_the_minimum_does_not_count() -> None:
    assert looked_up([1, 70, 80, 1]) == []
    assert looked_up([1, 70, 80, 1], min_match=1) == [70, 80, 1]


def test_a_match_longer_than_the_maximum_is_not_searched_for() -> None:
    tokens = [1, 2, 3, 70, 9, 2, 3, 80, 9, 1, 2, 3]
    assert looked_up(tokens, room=1, max_match=2) == [80]


def test_no_more_than_the_last_four_tokens_are_matched_unless_told_otherwise() -> None:
    tokens = [5, 1, 2, 3, 4, 70, 9, 1, 2, 3, 4, 80, 5, 1, 2, 3, 4]
    assert NgramProposer(min_match=2).propose("a", tokens, 1) == [80]
    assert looked_up(tokens, room=1, max_match=5) == [70]


def test_no_more_is_proposed_than_there_is_room() -> None:
    assert looked_up([1, 2, 3, 4, 5, 9, 1, 2], room=2) == [3, 4]


def test_a_run_of_tokens_does_not_find_itself() -> None:
    assert looked_up([1, 2, 3, 4]) == []


@pytest.mark.parametrize("tokens", [[1], [1, 1], [1, 2]])
def test_a_text_too_short_for_any_match_proposes_nothing(tokens: list[int]) -> None:
    assert looked_up(tokens) == []


def test_a_repeated_token_is_found_even_where_the_runs_overlap() -> None:
    assert looked_up([7, 7, 7]) == [7]


@given(texts, st.integers(1, 6), st.integers(1, 3), st.integers(0, 3))
@laws
def test_lookup_finds_what_a_scan_would_find(
    tokens: list[int], room: int, min_match: int, num_more: int
) -> None:
    max_match = min_match + num_more
    assert looked_up(tokens, room, min_match, max_match) == scanned(
        tokens, room, min_match, max_match
    )


@given(texts, texts, st.data())
@laws
def test_after_a_rollback_the_index_equals_a_fresh_one(
    before: list[int], after: list[int], data: st.DataObject
) -> None:
    proposer = NgramProposer(min_match=2)
    proposer.propose("a", before, 4)
    tokens = list(before)
    for token in after:
        if data.draw(st.booleans(), label="rolls back"):
            del tokens[data.draw(st.integers(0, len(tokens) - 1), label="kept") :]
            proposer.truncate("a", len(tokens))
        tokens.append(token)
        if data.draw(st.booleans(), label="is asked"):
            assert proposer.propose("a", tokens, 4) == looked_up(tokens) == scanned(tokens, 4)


def test_a_truncation_beyond_the_end_changes_nothing() -> None:
    proposer = NgramProposer(min_match=2)
    tokens = [1, 2, 3, 1, 2]
    assert proposer.propose("a", tokens, 2) == [3, 1]
    proposer.truncate("a", 50)
    assert proposer.propose("a", tokens, 2) == [3, 1]


# Sessions


def test_sessions_do_not_find_each_others_tokens() -> None:
    proposer = NgramProposer(min_match=2)
    assert proposer.propose("a", [1, 2, 3, 4], 4) == []
    assert proposer.propose("b", [9, 1, 2], 4) == []
    assert proposer.propose("a", [1, 2, 3, 4, 1, 2], 2) == [3, 4]
    proposer.close("a")
    assert proposer.propose("b", [9, 1, 2, 9, 1], 4) == [2, 9, 1]


def test_a_rollback_of_a_session_leaves_the_others_alone() -> None:
    proposer = NgramProposer(min_match=2)
    for name in "ab":
        proposer.propose(name, [1, 2, 3, 4], 4)
    proposer.truncate("a", 1)
    assert proposer.propose("a", [1, 5, 6, 7, 1, 2], 4) == []
    assert proposer.propose("b", [1, 2, 3, 4, 1, 2], 2) == [3, 4]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2)), max_size=40))
@laws
def test_each_of_many_sessions_gets_what_it_would_get_alone(moves: list[tuple[str, int]]) -> None:
    proposer = NgramProposer(min_match=2)
    tokens: dict[str, list[int]] = {name: [] for name in "abc"}
    for name, token in moves:
        tokens[name].append(token)
        assert proposer.propose(name, tokens[name], 4) == scanned(tokens[name], 4)


def test_a_closed_session_is_forgotten() -> None:
    proposer = NgramProposer(min_match=2)
    proposer.propose("a", [1, 2, 3, 4], 4)
    proposer.close("a")
    assert proposer.propose("a", [9, 8, 7, 1, 2], 4) == []
    assert proposer.propose("a", [9, 8, 7, 1, 2, 9, 8], 2) == [7, 1]


def test_a_session_that_was_never_looked_up_may_be_rolled_back_and_closed() -> None:
    proposer = NgramProposer(min_match=2)
    proposer.truncate("a", 1)
    proposer.close("a")
    assert proposer.propose("a", [1, 2, 3, 1, 2], 1) == [3]


# Drafters


def make_engine() -> SyntheticEngine:
    return SyntheticEngine(SyntheticModel(vocabulary=50))


@pytest.mark.parametrize(
    ("drafter", "sources", "has_model"),
    [
        (ngram_drafter(), {LOOKUP}, False),
        (model_drafter(make_engine(), with_ngrams=False), {MODEL}, True),
        (model_drafter(make_engine(), with_ngrams=True), {MODEL, LOOKUP}, True),
    ],
)
def test_a_drafter_says_where_its_tokens_may_come_from(
    drafter: Drafter, sources: set[DraftSource], has_model: bool
) -> None:
    assert drafter.sources == sources
    assert drafter.has_model is has_model


@pytest.mark.parametrize(
    ("drafter", "min_match"),
    [(ngram_drafter(), 2), (model_drafter(make_engine(), with_ngrams=True), 3)],
)
@pytest.mark.parametrize("num_same", [1, 2, 3, 4])
def test_beside_a_model_a_match_has_to_be_longer(
    drafter: Drafter, min_match: int, num_same: int
) -> None:
    [proposer] = drafter.proposers
    same = list(range(num_same))
    proposed = proposer.propose(f"{num_same}", [9, *same, 70, 8, *same], 1)
    assert proposed == ([70] if num_same >= min_match else [])


def test_ngram_lookup_without_a_model_fits_every_vocabulary() -> None:
    description = ngram_drafter().engine.description
    assert description.vocabulary.fits_any
    assert description.output_size == 0
