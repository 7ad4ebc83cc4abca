"""What drafters propose: a model's next token, or what followed the same tokens before."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from draft_service.drafters import DraftRequest, ModelDrafter, PromptLookupDrafter

laws = settings(deadline=None)
# Few different tokens, so that runs of them occur again.
texts = st.lists(st.integers(0, 2), min_size=1, max_size=30)


def looked_up(
    tokens: list[int], room: int = 4, drafter: PromptLookupDrafter | None = None
) -> list[int]:
    drafter = drafter or PromptLookupDrafter()
    [proposed] = drafter.draft([DraftRequest(drafter.open(100), tokens, room)])
    assert proposed is not None
    return list(proposed)


def scanned(tokens: list[int], room: int, max_match: int = 4, min_match: int = 2) -> list[int]:
    """What prompt lookup proposes, found the slow way."""
    for size in range(max_match, min_match - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if len(tokens) > size and tokens[end - size : end] == tokens[-size:]:
                return tokens[end : end + room]
    return []


# Prompt lookup


def test_what_followed_the_same_tokens_before_is_proposed() -> None:
    assert looked_up([1, 2, 3, 4, 5, 9, 1, 2]) == [3, 4, 5, 9]


def test_the_longest_match_counts() -> None:
    assert looked_up([1, 2, 3, 70, 9, 2, 3, 80, 9, 1, 2, 3], room=1) == [70]


def test_among_equal_matches_the_latest_counts() -> None:
    assert looked_up([1, 2, 70, 1, 2, 80, 1, 2], room=1) == [80]


def test_a_match_shorter_than_the_least_is_none() -> None:
    assert looked_up([1, 70, 80, 1]) == []
    assert looked_up([1, 70, 80, 1], drafter=PromptLookupDrafter(min_match=1)) == [70, 80, 1]


def test_a_match_longer_than_the_most_is_not_looked_for() -> None:
    tokens = [1, 2, 3, 70, 9, 2, 3, 80, 9, 1, 2, 3]
    assert looked_up(tokens, room=1, drafter=PromptLookupDrafter(max_match=2)) == [80]


def test_no_more_is_proposed_than_there_is_room() -> None:
    assert looked_up([1, 2, 3, 4, 5, 9, 1, 2], room=2) == [3, 4]


def test_a_run_does_not_find_itself() -> None:
    assert looked_up([1, 2, 3, 4]) == []


@pytest.mark.parametrize("tokens", [[1], [1, 1], [1, 2]])
def test_a_text_too_short_for_any_match_proposes_nothing(tokens: list[int]) -> None:
    assert looked_up(tokens) == []


def test_a_repeated_token_is_found_even_where_the_runs_overlap() -> None:
    assert looked_up([7, 7, 7]) == [7]


@given(texts, st.integers(1, 6))
@laws
def test_a_look_up_finds_what_a_scan_would_find(tokens: list[int], room: int) -> None:
    assert looked_up(tokens, room) == scanned(tokens, room)


@given(texts, texts, st.data())
@laws
def test_after_a_rollback_the_index_equals_a_fresh_one(
    before: list[int], after: list[int], data: st.DataObject
) -> None:
    drafter = PromptLookupDrafter()
    slot = drafter.open(100)
    tokens = list(before)
    for token in after:
        if data.draw(st.booleans(), label="rolls back"):
            del tokens[data.draw(st.integers(0, len(tokens) - 1), label="kept") :]
            drafter.truncate(slot, len(tokens))
        tokens.append(token)
        [proposed] = drafter.draft([DraftRequest(slot, tokens, 4)])
        assert proposed == tuple(scanned(tokens, 4))


def test_a_truncation_beyond_the_end_changes_nothing() -> None:
    drafter = PromptLookupDrafter()
    slot = drafter.open(100)
    tokens = [1, 2, 3, 1, 2]
    first = drafter.draft([DraftRequest(slot, tokens, 2)])
    drafter.truncate(slot, 50)
    assert drafter.draft([DraftRequest(slot, tokens, 2)]) == first


def test_slots_do_not_find_each_others_tokens() -> None:
    drafter = PromptLookupDrafter()
    first, second = drafter.open(100), drafter.open(100)
    drafter.draft([DraftRequest(first, [1, 2, 3, 4], 4)])
    requests = [DraftRequest(second, [9, 1, 2], 4), DraftRequest(first, [1, 2, 3, 4, 1, 2], 2)]
    assert drafter.draft(requests) == [(), (3, 4)]
    drafter.close(first)
    assert drafter.draft([DraftRequest(second, [9, 1, 2, 9, 1], 4)]) == [(2, 9, 1)]


def test_prompt_lookup_fits_every_vocabulary() -> None:
    description = PromptLookupDrafter().description
    assert description.vocabulary.fits_any
    assert description.output_size == 0


# A model


def make_model_drafter(prefill_tokens: int) -> ModelDrafter:
    return ModelDrafter(SyntheticEngine(SyntheticModel(vocabulary=50)), prefill_tokens)


def drafted(drafter: ModelDrafter, slot: int, tokens: list[int]) -> tuple[int, ...]:
    """Ask until there is an answer."""
    while True:
        [answer] = drafter.draft([DraftRequest(slot, tokens, 4)])
        if answer is not None:
            return answer


def test_a_model_drafts_its_next_token() -> None:
    drafter = make_model_drafter(prefill_tokens=100)
    [answer] = drafter.draft([DraftRequest(drafter.open(10), [1, 2, 3], 4)])
    assert answer == (SyntheticModel(vocabulary=50).next_token([1, 2, 3]),)


def test_a_long_prompt_is_read_in_pieces() -> None:
    drafter = make_model_drafter(prefill_tokens=2)
    slot = drafter.open(10)
    request = DraftRequest(slot, [1, 2, 3, 4, 5], 4)
    assert drafter.draft([request]) == [None]
    assert drafter.draft([request]) == [None]
    assert drafter.draft([request]) == [(SyntheticModel(vocabulary=50).next_token(request.tokens),)]


@given(texts, texts, st.integers(1, 5), st.data())
@laws
def test_a_model_that_was_rolled_back_drafts_as_a_fresh_one(
    before: list[int], after: list[int], prefill_tokens: int, data: st.DataObject
) -> None:
    drafter = make_model_drafter(prefill_tokens)
    slot = drafter.open(100)
    drafted(drafter, slot, before)
    kept = data.draw(st.integers(0, len(before)))
    drafter.truncate(slot, kept)
    tokens = before[:kept] + after
    fresh = make_model_drafter(100)
    assert drafted(drafter, slot, tokens) == drafted(fresh, fresh.open(100), tokens)
