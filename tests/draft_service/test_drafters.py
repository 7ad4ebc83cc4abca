"""What drafters propose: a model's next token, or what followed the same tokens before."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amusd.engine.interface import ScheduledSequence
from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from amusd.protocol.draft_source import DraftSource
from draft_service.drafters import (
    Drafted,
    Drafter,
    DraftRequest,
    HybridDrafter,
    ModelDrafter,
    PromptLookupDrafter,
    Reading,
)

MODEL, LOOKUP = DraftSource.MODEL, DraftSource.LOOKUP

laws = settings(deadline=None)
# Few different tokens, so that runs of them occur again.
texts = st.lists(st.integers(0, 2), min_size=1, max_size=30)


def looked_up(
    tokens: list[int], room: int = 4, drafter: PromptLookupDrafter | None = None
) -> list[int]:
    drafter = drafter or PromptLookupDrafter()
    [proposed] = drafter.draft([DraftRequest(drafter.open(100), tokens, room)])
    assert isinstance(proposed, Drafted)
    return list(proposed.tokens)


def looked(*tokens: int) -> Drafted:
    return Drafted(LOOKUP, tokens)


def modelled(tokens: list[int]) -> Drafted:
    """What the model drafts after ``tokens``."""
    return Drafted(MODEL, (SyntheticModel(vocabulary=50).next_token(tokens),))


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
        assert proposed == looked(*scanned(tokens, 4))


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
    assert drafter.draft(requests) == [looked(), looked(3, 4)]
    drafter.close(first)
    assert drafter.draft([DraftRequest(second, [9, 1, 2, 9, 1], 4)]) == [looked(2, 9, 1)]


def test_prompt_lookup_fits_every_vocabulary() -> None:
    description = PromptLookupDrafter().description
    assert description.vocabulary.fits_any
    assert description.output_size == 0


# A model


def make_model_drafter(prefill_tokens: int) -> ModelDrafter:
    return ModelDrafter(SyntheticEngine(SyntheticModel(vocabulary=50)), prefill_tokens)


def drafted(drafter: Drafter, slot: int, tokens: list[int]) -> tuple[int, ...]:
    """Ask until there is an answer."""
    while True:
        [answer] = drafter.draft([DraftRequest(slot, tokens, 4)])
        if isinstance(answer, Drafted):
            return answer.tokens


def test_a_model_drafts_its_next_token() -> None:
    drafter = make_model_drafter(prefill_tokens=100)
    [answer] = drafter.draft([DraftRequest(drafter.open(10), [1, 2, 3], 4)])
    assert answer == modelled([1, 2, 3])


def test_a_long_prompt_is_read_in_pieces() -> None:
    drafter = make_model_drafter(prefill_tokens=2)
    slot = drafter.open(10)
    request = DraftRequest(slot, [1, 2, 3, 4, 5], 4)
    assert drafter.draft([request]) == [Reading()]
    assert drafter.draft([request]) == [Reading()]
    assert drafter.draft([request]) == [modelled(request.tokens)]


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


# A look-up beside a model


class CountingEngine(SyntheticEngine):
    """Remembers how many tokens of how many slots each pass has read."""

    def __init__(self, batch: int = 1) -> None:
        super().__init__(SyntheticModel(vocabulary=50, batch=batch))
        self.passes: list[list[int]] = []

    def run(self, feeds: Sequence[ScheduledSequence]) -> list[list[int]]:
        self.passes.append([len(feed.tokens) for feed in feeds])
        return super().run(feeds)


def make_hybrid(engine: SyntheticEngine | None = None, prefill_tokens: int = 100) -> HybridDrafter:
    return HybridDrafter(ModelDrafter(engine or CountingEngine(), prefill_tokens))


REPEATING = [1, 2, 3, 4, 5, 9, 1, 2, 3]
NEW = [1, 2, 3, 4, 5]


def test_where_the_last_three_tokens_occurred_before_no_pass_of_the_model_is_needed() -> None:
    engine = CountingEngine()
    drafter = make_hybrid(engine)
    assert drafter.draft([DraftRequest(drafter.open(100), REPEATING, 2)]) == [looked(4, 5)]
    assert engine.passes == []


@pytest.mark.parametrize("tokens", [NEW, [1, 2, 70, 9, 1, 2], [1]])
def test_where_they_did_not_the_model_drafts(tokens: list[int]) -> None:
    drafter = make_hybrid()
    assert drafter.draft([DraftRequest(drafter.open(100), tokens, 4)]) == [modelled(tokens)]


def test_the_model_catches_up_on_what_was_looked_up_in_one_pass() -> None:
    engine = CountingEngine()
    drafter = make_hybrid(engine)
    slot = drafter.open(100)
    drafter.draft([DraftRequest(slot, NEW, 4)])
    drafter.draft([DraftRequest(slot, [*NEW, 9, 1, 2, 3], 2)])
    tokens = [*NEW, 9, 1, 2, 3, 4, 5, 60]
    assert drafter.draft([DraftRequest(slot, tokens, 4)]) == [modelled(tokens)]
    assert engine.passes == [[5], [7]]


@pytest.mark.parametrize(
    ("sources", "answer"),
    [
        ({MODEL, LOOKUP}, looked(4, 5)),
        ({LOOKUP}, looked(4, 5)),
        ({MODEL}, modelled(REPEATING)),
        (set(), looked()),
    ],
)
def test_only_sources_that_may_draft_are_asked(sources: set[DraftSource], answer: Drafted) -> None:
    drafter = make_hybrid()
    request = DraftRequest(drafter.open(100), REPEATING, 2, frozenset(sources))
    assert drafter.draft([request]) == [answer]


def test_without_a_match_and_without_the_model_there_is_nothing_to_propose() -> None:
    drafter = make_hybrid()
    request = DraftRequest(drafter.open(100), NEW, 4, frozenset((LOOKUP,)))
    assert drafter.draft([request]) == [looked()]


def test_a_look_up_that_was_off_knows_what_was_written_since() -> None:
    drafter = make_hybrid()
    slot = drafter.open(100)
    drafter.draft([DraftRequest(slot, NEW, 4, frozenset((MODEL,)))])
    assert drafter.draft([DraftRequest(slot, [*NEW, 1, 2, 3], 2)]) == [looked(4, 5)]


def test_the_model_reads_a_long_prompt_before_anything_is_looked_up() -> None:
    engine = CountingEngine()
    drafter = make_hybrid(engine, prefill_tokens=4)
    request = DraftRequest(drafter.open(100), REPEATING, 2)
    assert drafter.draft([request]) == [Reading()]
    assert drafter.draft([request]) == [Reading()]
    assert drafter.draft([request]) == [looked(4, 5)]
    assert engine.passes == [[4], [4]]


def test_a_batch_takes_those_to_the_model_that_have_no_match() -> None:
    engine = CountingEngine(batch=3)
    drafter = make_hybrid(engine)
    texts = (NEW, REPEATING, [7, 8])
    requests = [DraftRequest(drafter.open(100), list(text), 1) for text in texts]
    assert drafter.draft(requests) == [modelled(NEW), looked(4), modelled([7, 8])]
    assert engine.passes == [[5, 2]]


def test_a_slot_is_closed_on_both_sides() -> None:
    engine = CountingEngine()
    drafter = make_hybrid(engine)
    first, second = drafter.open(100), drafter.open(100)
    drafter.draft([DraftRequest(first, REPEATING, 2)])
    drafter.close(first)
    assert engine.num_open == 1
    assert drafter.draft([DraftRequest(second, [9, 1, 2, 3], 2)]) == [modelled([9, 1, 2, 3])]


@given(texts, texts, st.integers(1, 5), st.data())
@laws
def test_after_a_rollback_both_are_as_fresh_ones(
    before: list[int], after: list[int], prefill_tokens: int, data: st.DataObject
) -> None:
    drafter = make_hybrid(prefill_tokens=prefill_tokens)
    slot = drafter.open(100)
    tokens = list(before)
    for token in after:
        if data.draw(st.booleans(), label="rolls back"):
            del tokens[data.draw(st.integers(0, len(tokens) - 1), label="kept") :]
            drafter.truncate(slot, len(tokens))
        tokens.append(token)
        fresh = make_hybrid()
        expected = drafted(fresh, fresh.open(100), tokens)
        assert drafted(drafter, slot, tokens) == expected
