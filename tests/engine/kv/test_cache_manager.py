"""The KV cache manager: memory budget, prefix reuse, and what closed sequences retain."""

import dataclasses
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from amusd.engine.kv.cache_manager import MIN_CACHED, KVCacheManager, common_prefix
from amusd.protocol.errors import CacheFullError, InvalidInputError, LimitExceededError

PROMPT = list(range(100, 100 + 2 * MIN_CACHED))
HALF = PROMPT[:MIN_CACHED]

Manager = KVCacheManager[list[int]]


def copy_tokens(donor: list[int], target: list[int], length: int) -> None:
    """A buffer is the tokens themselves, so a wrong copy shows."""
    target[:] = donor[:length]


def make_manager(max_tokens: int = 1000, context: int = 500) -> Manager:
    return KVCacheManager(max_tokens, context, allocate=lambda capacity: [], copy=copy_tokens)


def write(manager: Manager, slot: int, tokens: list[int]) -> None:
    manager.extend(slot, tokens, is_prompt=True)
    manager[slot].extend(tokens)


def opened(manager: Manager, tokens: list[int], capacity: int = 100) -> int:
    slot = manager.open(capacity)
    write(manager, slot, tokens)
    return slot


# Memory budget


def test_a_sequence_reserves_its_capacity_until_it_closes() -> None:
    manager = make_manager()
    slot = manager.open(300)
    assert (manager.usage.num_reserved, manager.length(slot), len(manager)) == (300, 0, 1)
    manager.close(slot)
    assert (manager.usage.num_reserved, len(manager)) == (0, 0)


def test_without_room_beside_the_open_sequences_the_cache_is_full_until_one_closes() -> None:
    manager = make_manager(max_tokens=500)
    first = manager.open(300)
    with pytest.raises(CacheFullError, match="300 of 500 tokens of memory are in use, 201 more"):
        manager.open(201)
    manager.close(first)
    manager.open(201)


@pytest.mark.parametrize(("capacity", "words"), [(501, "context"), (500, "--cache-mib")])
def test_a_sequence_larger_than_the_context_or_the_memory_is_refused_for_good(
    capacity: int, words: str
) -> None:
    manager = make_manager(max_tokens=400 if words == "--cache-mib" else 1000)
    with pytest.raises(InvalidInputError, match=words):
        manager.open(capacity)


def test_tokens_beyond_the_capacity_are_refused_and_nothing_changes() -> None:
    manager = make_manager()
    slot = opened(manager, [1, 2], capacity=3)
    with pytest.raises(LimitExceededError, match="opened for 3 tokens"):
        manager.extend(slot, [3, 4], is_prompt=True)
    assert (manager.length(slot), manager.usage.num_computed) == (2, 2)


# Prefix reuse


def test_a_prefix_is_copied_from_an_open_sequence() -> None:
    manager = make_manager()
    opened(manager, [*PROMPT, 1, 2])
    slot = manager.open(100)
    assert manager.reuse(slot, [*PROMPT, 7, 8]) == len(PROMPT)
    assert manager[slot] == PROMPT
    assert manager.usage.num_cached == len(PROMPT)


def test_a_prefix_is_copied_from_a_closed_sequence() -> None:
    manager = make_manager()
    manager.close(opened(manager, PROMPT))
    slot = manager.open(100)
    assert manager.reuse(slot, [*PROMPT, 7]) == len(PROMPT)
    assert manager[slot] == PROMPT


def test_the_last_token_is_always_computed() -> None:
    manager = make_manager()
    opened(manager, PROMPT)
    slot = manager.open(100)
    assert manager.reuse(slot, PROMPT) == len(PROMPT) - 1


@pytest.mark.parametrize("num_held", [0, 5])
def test_a_prefix_too_short_to_save_time_is_not_copied(num_held: int) -> None:
    manager = make_manager()
    opened(manager, PROMPT)
    slot = opened(manager, PROMPT[:num_held])
    most = num_held + MIN_CACHED
    assert manager.reuse(slot, [*PROMPT[: most - 1], 7, 8]) == 0
    assert manager.reuse(slot, [*PROMPT[:most], 7, 8]) == MIN_CACHED


def test_during_prefill_a_sequence_reuses_what_another_one_computed_meanwhile() -> None:
    manager = make_manager()
    slow, quick = opened(manager, HALF), opened(manager, HALF)
    write(manager, quick, PROMPT[MIN_CACHED:])
    assert manager.reuse(slow, [*PROMPT, 7]) == MIN_CACHED
    assert manager[slow] == PROMPT
    assert manager.reuse(slow, [*PROMPT, 7]) == 0


def test_truncated_tokens_are_not_reused() -> None:
    manager = make_manager()
    donor = opened(manager, PROMPT)
    manager.truncate(donor, MIN_CACHED)
    del manager[donor][MIN_CACHED:]
    slot = manager.open(100)
    assert manager.reuse(slot, [*PROMPT, 7]) == MIN_CACHED


def test_a_reused_prefix_is_no_longer_than_the_capacity() -> None:
    manager = make_manager()
    opened(manager, PROMPT)
    slot = manager.open(MIN_CACHED + 2)
    assert manager.reuse(slot, PROMPT) == MIN_CACHED + 2


def test_without_a_copy_function_nothing_is_reused_or_retained() -> None:
    manager: Manager = KVCacheManager(1000, 500, allocate=lambda capacity: [])
    manager.close(opened(manager, PROMPT))
    assert manager.usage.num_retained == 0
    opened(manager, PROMPT)
    assert manager.reuse(manager.open(100), [*PROMPT, 7]) == 0


# What closed sequences retain


def test_closed_sequences_retain_at_most_a_quarter_and_the_oldest_is_evicted_first() -> None:
    manager = make_manager(max_tokens=1000)
    texts = [[text, *PROMPT] for text in range(3)]
    for text in texts:
        manager.close(opened(manager, text, capacity=100))
    assert manager.usage.num_retained == 200
    found = [manager.reuse(manager.open(50), [*text, 7]) for text in texts]
    assert found == [0, len(PROMPT) + 1, len(PROMPT) + 1]


def test_the_least_recently_used_is_evicted_first() -> None:
    manager = make_manager(max_tokens=1000)
    first, second, third = ([text, *PROMPT] for text in range(3))
    for text in (first, second):
        manager.close(opened(manager, text, capacity=100))
    slot = manager.open(50)
    manager.reuse(slot, [*first, 7])
    manager.close(opened(manager, third, capacity=100))
    assert manager.reuse(manager.open(50), [*second, 7]) == 0
    assert manager.reuse(manager.open(50), [*third, 7]) == len(third)


def test_a_new_sequence_takes_the_memory_of_closed_ones() -> None:
    manager = make_manager(max_tokens=1000, context=1000)
    manager.close(opened(manager, PROMPT))
    manager.open(950)
    assert dataclasses.astuple(manager.usage)[:3] == (1000, 950, 0)


def test_a_closed_sequence_that_repeats_another_is_not_retained_twice() -> None:
    manager = make_manager()
    for text in (PROMPT, [*PROMPT, 7], PROMPT):
        manager.close(opened(manager, text))
    assert manager.usage.num_retained == 100


def test_the_buffer_of_a_closed_sequence_that_repeats_another_is_freed() -> None:
    freed: list[list[int]] = []
    manager: Manager = KVCacheManager(1000, 500, lambda capacity: [], copy_tokens, freed.append)
    manager.close(opened(manager, [*PROMPT, 7]))
    repeated = opened(manager, PROMPT)
    buffer = manager[repeated]
    manager.close(repeated)
    assert len(freed) == 1
    assert freed[0] is buffer


def test_the_hit_rate_counts_prompts_only() -> None:
    manager = make_manager()
    assert manager.usage.hit_rate == 0.0
    slot = opened(manager, PROMPT)
    manager.extend(slot, [1, 2, 3])  # decoded tokens
    manager.reuse(manager.open(100), [*PROMPT, 7])
    assert manager.usage.hit_rate == 0.5


def test_the_integrity_check_notices_a_lost_buffer_and_a_shared_one() -> None:
    manager = make_manager()
    first, second = opened(manager, PROMPT), opened(manager, PROMPT)
    manager.check_integrity()
    manager._open[second].buffer = manager[first]
    with pytest.raises(AssertionError, match="no owner, or more than one"):
        manager.check_integrity()
    del manager._open[second]
    with pytest.raises(AssertionError, match="no owner, or more than one"):
        manager.check_integrity()


texts = st.lists(st.integers(0, 1), max_size=3 * MIN_CACHED)


@given(texts, texts, st.integers(0, 2 * MIN_CACHED))
@settings(deadline=None)
def test_a_common_prefix_is_found_as_by_comparing_one_by_one(
    first: list[int], second: list[int], num_same: int
) -> None:
    second = first[:num_same] + second
    pairs = zip(first, second, strict=False)
    expected = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    assert common_prefix(first, second) == expected


class AnyUse(RuleBasedStateMachine):
    """Open, write, roll back and close in any order: buffers and counts stay right."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = make_manager(max_tokens=400, context=120)
        self.texts: dict[int, list[int]] = {}

    @rule(capacity=st.integers(1, 120))
    def open(self, capacity: int) -> None:
        try:
            slot = self.manager.open(capacity)
        except CacheFullError:
            assert self.manager.usage.num_reserved + capacity > 400
        else:
            assert slot not in self.texts
            self.texts[slot] = []

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), kind=st.integers(0, 1), num_tokens=st.integers(1, 60))
    def prefill(self, data: st.DataObject, kind: int, num_tokens: int) -> None:
        """Two texts only, so sequences have much in common."""
        slot = data.draw(st.sampled_from(list(self.texts)))
        text = [*self.texts[slot], *[kind] * num_tokens]
        before = len(self.texts[slot])
        num_cached = self._reuse(slot, text)
        rest = text[before + num_cached :]
        try:
            self.manager.extend(slot, rest, is_prompt=True)
        except LimitExceededError:
            return
        self.manager[slot].extend(rest)
        self.texts[slot] = text

    def _reuse(self, slot: int, text: list[int]) -> int:
        num_cached = self.manager.reuse(slot, text)
        assert num_cached == 0 or num_cached >= MIN_CACHED
        self.texts[slot] = text[: len(self.texts[slot]) + num_cached]
        return num_cached

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(list(self.texts)))
        length = data.draw(st.integers(0, len(self.texts[slot])))
        self.manager.truncate(slot, length)
        del self.manager[slot][length:], self.texts[slot][length:]

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(list(self.texts)))
        self.manager.close(slot)
        del self.texts[slot]

    @invariant()
    def buffers_hold_what_was_written(self) -> None:
        for slot, text in self.texts.items():
            assert self.manager[slot] == text
            assert self.manager.length(slot) == len(text)

    @invariant()
    def the_manager_keeps_its_limits(self) -> None:
        self.manager.check_integrity()
        usage = self.manager.usage
        assert usage.num_reserved + usage.num_retained <= usage.max_tokens
        assert usage.num_retained <= usage.max_tokens // 4
        assert len(self.manager) == len(self.texts)


TestAnyUse = AnyUse.TestCase
TestAnyUse.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
