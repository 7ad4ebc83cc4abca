"""Slots within a limit: what fits, what is kept of closed ones, and what is copied from where."""

import dataclasses
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from amusd.engine.kv.cache_manager import MIN_CACHED, KVCacheManager, common_prefix
from amusd.protocol.errors import CacheFullError, LimitExceededError

PROMPT = list(range(100, 100 + 2 * MIN_CACHED))
HALF = PROMPT[:MIN_CACHED]


def copy_rows(donor: list[int], target: list[int], length: int) -> None:
    """A buffer here is the tokens themselves, so that a wrong copy shows."""
    target[:] = donor[:length]


def make_memory(max_tokens: int = 1000, context: int = 500) -> KVCacheManager[list[int]]:
    return KVCacheManager(max_tokens, context, make=lambda capacity: [], copy=copy_rows)


def write(memory: KVCacheManager[list[int]], slot: int, tokens: list[int]) -> None:
    memory.extend(slot, tokens, is_prompt=True)
    memory[slot].extend(tokens)


def opened(memory: KVCacheManager[list[int]], tokens: list[int], capacity: int = 100) -> int:
    slot = memory.open(capacity)
    write(memory, slot, tokens)
    return slot


# What fits


def test_a_slot_reserves_all_it_may_ever_hold_until_it_is_closed() -> None:
    memory = make_memory()
    slot = memory.open(300)
    assert (memory.usage.num_reserved, memory.length(slot), len(memory)) == (300, 0, 1)
    memory.close(slot)
    assert (memory.usage.num_reserved, len(memory)) == (0, 0)


def test_without_room_beside_the_open_ones_the_memory_is_full_until_one_is_closed() -> None:
    memory = make_memory(max_tokens=500)
    first = memory.open(300)
    with pytest.raises(CacheFullError, match="300 of 500 tokens of memory are in use, 201 more"):
        memory.open(201)
    memory.close(first)
    memory.open(201)


@pytest.mark.parametrize(("capacity", "words"), [(501, "context"), (500, "--cache-mib")])
def test_what_would_not_fit_alone_is_over_a_limit_for_good(capacity: int, words: str) -> None:
    memory = make_memory(max_tokens=400 if words == "--cache-mib" else 1000)
    with pytest.raises(LimitExceededError, match=words) as caught:
        memory.open(capacity)
    assert not isinstance(caught.value, CacheFullError)


def test_a_slot_takes_no_more_than_it_was_opened_for_and_keeps_what_it_has() -> None:
    memory = make_memory()
    slot = opened(memory, [1, 2], capacity=3)
    with pytest.raises(LimitExceededError, match="opened for 3 tokens"):
        memory.extend(slot, [3, 4], is_prompt=True)
    assert (memory.length(slot), memory.usage.num_computed) == (2, 2)


# What is reused


def test_a_common_beginning_is_copied_from_an_open_slot() -> None:
    memory = make_memory()
    opened(memory, [*PROMPT, 1, 2])
    slot = memory.open(100)
    assert memory.reuse(slot, [*PROMPT, 7, 8]) == len(PROMPT)
    assert memory[slot] == PROMPT
    assert memory.usage.num_cached == len(PROMPT)


def test_a_common_beginning_is_copied_from_a_closed_slot() -> None:
    memory = make_memory()
    memory.close(opened(memory, PROMPT))
    slot = memory.open(100)
    assert memory.reuse(slot, [*PROMPT, 7]) == len(PROMPT)
    assert memory[slot] == PROMPT


def test_the_last_token_is_never_taken_over() -> None:
    memory = make_memory()
    opened(memory, PROMPT)
    slot = memory.open(100)
    assert memory.reuse(slot, PROMPT) == len(PROMPT) - 1


@pytest.mark.parametrize("num_held", [0, 5])
def test_too_little_to_save_anything_is_not_copied(num_held: int) -> None:
    memory = make_memory()
    opened(memory, PROMPT)
    slot = opened(memory, PROMPT[:num_held])
    most = num_held + MIN_CACHED
    assert memory.reuse(slot, [*PROMPT[: most - 1], 7, 8]) == 0
    assert memory.reuse(slot, [*PROMPT[:most], 7, 8]) == MIN_CACHED


def test_a_slot_that_reads_may_take_over_what_another_read_meanwhile() -> None:
    memory = make_memory()
    slow, quick = opened(memory, HALF), opened(memory, HALF)
    write(memory, quick, PROMPT[MIN_CACHED:])
    assert memory.reuse(slow, [*PROMPT, 7]) == MIN_CACHED
    assert memory[slow] == PROMPT
    assert memory.reuse(slow, [*PROMPT, 7]) == 0


def test_what_was_truncated_is_not_there_to_be_reused() -> None:
    memory = make_memory()
    donor = opened(memory, PROMPT)
    memory.truncate(donor, MIN_CACHED)
    del memory[donor][MIN_CACHED:]
    slot = memory.open(100)
    assert memory.reuse(slot, [*PROMPT, 7]) == MIN_CACHED


def test_no_more_is_taken_over_than_the_slot_was_opened_for() -> None:
    memory = make_memory()
    opened(memory, PROMPT)
    slot = memory.open(MIN_CACHED + 2)
    assert memory.reuse(slot, PROMPT) == MIN_CACHED + 2


def test_without_a_way_to_copy_nothing_is_reused_or_kept() -> None:
    memory: KVCacheManager[list[int]] = KVCacheManager(1000, 500, make=lambda capacity: [])
    memory.close(opened(memory, PROMPT))
    assert memory.usage.num_retained == 0
    opened(memory, PROMPT)
    assert memory.reuse(memory.open(100), [*PROMPT, 7]) == 0


# What is kept


def test_closed_slots_keep_at_most_a_quarter_and_the_oldest_go_first() -> None:
    memory = make_memory(max_tokens=1000)
    texts = [[text, *PROMPT] for text in range(3)]
    for text in texts:
        memory.close(opened(memory, text, capacity=100))
    assert memory.usage.num_retained == 200
    found = [memory.reuse(memory.open(50), [*text, 7]) for text in texts]
    assert found == [0, len(PROMPT) + 1, len(PROMPT) + 1]


def test_what_was_reused_last_is_kept_longest() -> None:
    memory = make_memory(max_tokens=1000)
    first, second, third = ([text, *PROMPT] for text in range(3))
    for text in (first, second):
        memory.close(opened(memory, text, capacity=100))
    slot = memory.open(50)
    memory.reuse(slot, [*first, 7])
    memory.close(opened(memory, third, capacity=100))
    assert memory.reuse(memory.open(50), [*second, 7]) == 0
    assert memory.reuse(memory.open(50), [*third, 7]) == len(third)


def test_an_opening_takes_the_room_of_closed_slots() -> None:
    memory = make_memory(max_tokens=1000, context=1000)
    memory.close(opened(memory, PROMPT))
    memory.open(950)
    assert dataclasses.astuple(memory.usage)[:3] == (1000, 950, 0)


def test_a_closed_slot_that_only_repeats_another_is_not_kept_twice() -> None:
    memory = make_memory()
    for text in (PROMPT, [*PROMPT, 7], PROMPT):
        memory.close(opened(memory, text))
    assert memory.usage.num_retained == 100


def test_the_hit_rate_counts_prompts_only() -> None:
    memory = make_memory()
    assert memory.usage.hit_rate == 0.0
    slot = opened(memory, PROMPT)
    memory.extend(slot, [1, 2, 3])  # what was decoded
    memory.reuse(memory.open(100), [*PROMPT, 7])
    assert memory.usage.hit_rate == 0.5


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
    """Whatever is opened, written, rolled back and closed: buffers and counts stay right."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = make_memory(max_tokens=400, context=120)
        self.texts: dict[int, list[int]] = {}

    @rule(capacity=st.integers(1, 120))
    def open(self, capacity: int) -> None:
        try:
            slot = self.memory.open(capacity)
        except CacheFullError:
            assert self.memory.usage.num_reserved + capacity > 400
        else:
            assert slot not in self.texts
            self.texts[slot] = []

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), kind=st.integers(0, 1), num_tokens=st.integers(1, 60))
    def read(self, data: st.DataObject, kind: int, num_tokens: int) -> None:
        """One of two texts, so that slots have much in common."""
        slot = data.draw(st.sampled_from(list(self.texts)))
        text = [*self.texts[slot], *[kind] * num_tokens]
        before = len(self.texts[slot])
        num_cached = self._reuse(slot, text)
        rest = text[before + num_cached :]
        try:
            self.memory.extend(slot, rest, is_prompt=True)
        except LimitExceededError:
            return
        self.memory[slot].extend(rest)
        self.texts[slot] = text

    def _reuse(self, slot: int, text: list[int]) -> int:
        num_cached = self.memory.reuse(slot, text)
        assert num_cached == 0 or num_cached >= MIN_CACHED
        self.texts[slot] = text[: len(self.texts[slot]) + num_cached]
        return num_cached

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(list(self.texts)))
        length = data.draw(st.integers(0, len(self.texts[slot])))
        self.memory.truncate(slot, length)
        del self.memory[slot][length:], self.texts[slot][length:]

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(list(self.texts)))
        self.memory.close(slot)
        del self.texts[slot]

    @invariant()
    def buffers_hold_what_was_written(self) -> None:
        for slot, text in self.texts.items():
            assert self.memory[slot] == text
            assert self.memory.length(slot) == len(text)

    @invariant()
    def no_more_is_in_use_than_there_is(self) -> None:
        usage = self.memory.usage
        assert usage.num_reserved + usage.num_retained <= usage.max_tokens
        assert usage.num_retained <= usage.max_tokens // 4
        assert len(self.memory) == len(self.texts)


TestAnyUse = AnyUse.TestCase
TestAnyUse.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
