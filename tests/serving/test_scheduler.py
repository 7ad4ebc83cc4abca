"""Which sequences wait for memory, and which are in the next batch with how many tokens."""

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.protocol.errors import (
    CacheFullError,
    DuplicateSessionError,
    InvalidInputError,
    LimitExceededError,
)
from amusd.serving.scheduler import divide
from tests.serving.fake_serving import LIMITS, NEXT, FakeService, make_sequence, slot_of

MEMORY = 100
PROMPT = list(range(100))


def test_the_scheduler_imports_no_torch_grpc_or_asyncio() -> None:
    code = (
        "import sys, amusd.serving.scheduler, amusd.serving.sequence\n"
        "sys.exit(bool({'torch', 'grpc', 'asyncio'} & set(sys.modules)))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# The waiting queue


def test_a_sequence_without_memory_waits_and_gets_it_when_another_is_removed() -> None:
    service = FakeService(MEMORY)
    first, second = service.add("a", capacity=60), service.add("b", capacity=60)
    assert service.counts == (1, 1)
    assert first.slot is not None
    assert second.slot is None
    assert service.remove("a") == [second]
    assert service.counts == (1, 0)
    assert first.slot is None
    assert second.slot is not None


def test_no_sequence_overtakes_the_waiting_ones() -> None:
    service = FakeService(MEMORY)
    service.add("a", capacity=60)
    large, small = service.add("large", capacity=60), service.add("small", capacity=10)
    assert small.slot is None
    assert service.remove("a") == [large, small]


def test_the_first_waiting_sequence_holds_the_others_back_until_it_fits() -> None:
    service = FakeService(MEMORY)
    service.add("a", capacity=50)
    service.add("b", capacity=50)
    large, small = service.add("large", capacity=60), service.add("small", capacity=10)
    assert service.remove("a") == []
    assert service.remove("b") == [large, small]


def test_a_waiting_sequence_that_is_removed_makes_way_for_those_behind() -> None:
    service = FakeService(MEMORY)
    service.add("a", capacity=60)
    service.add("large", capacity=60)
    small = service.add("small", capacity=10)
    assert service.remove("large") == [small]
    assert service.counts == (2, 0)


def test_a_full_waiting_queue_refuses_and_names_the_options() -> None:
    service = FakeService(MEMORY)
    for name in "abc":
        service.add(name, capacity=60)
    with pytest.raises(
        CacheFullError, match=r"2 sessions wait for some.*--cache-mib or --max-waiting"
    ):
        service.add("d", capacity=10)
    assert service.scheduler.get("d") is None
    assert service.counts == (1, 2)


def test_without_a_waiting_queue_full_memory_refuses_at_once() -> None:
    service = FakeService(MEMORY, replace(LIMITS, max_waiting=0))
    service.add("a", capacity=60)
    with pytest.raises(CacheFullError, match="60 of 100 tokens"):
        service.add("b", capacity=60)
    assert service.scheduler.get("b") is None
    assert service.counts == (1, 0)


@pytest.mark.parametrize("num_others", [0, 2])
def test_a_sequence_that_can_never_fit_is_refused_even_behind_others(num_others: int) -> None:
    service = FakeService(MEMORY)
    for number in range(num_others):
        service.add(str(number), capacity=60)
    with pytest.raises(InvalidInputError, match="--cache-mib") as caught:
        service.add("a", capacity=101)
    assert not isinstance(caught.value, CacheFullError)
    assert service.scheduler.get("a") is None


def test_a_sequence_that_turns_out_too_large_fails_and_lets_the_next_one_in() -> None:
    service = FakeService(memory=2000, limits=replace(LIMITS, max_waiting=3))
    service.add("a", capacity=1000)
    service.add("b", capacity=1000)
    third = service.add("c", capacity=1000)
    large = service.add("large", capacity=1001)  # above the context, below the memory
    small = service.add("small", capacity=10)
    assert not large.has_failed
    assert service.remove("a") == [third]
    assert ["1001 tokens do not fit" in str(error) for error in large.errors] == [True]
    assert large.has_failed
    assert service.remove("b") == [small]
    assert service.remove("large") == []


def test_waiting_sequences_count_as_sessions() -> None:
    service = FakeService(MEMORY, replace(LIMITS, max_sessions=2))
    service.add("a", capacity=60)
    service.add("b", capacity=60)
    with pytest.raises(LimitExceededError, match=r"2 sessions are open.*--max-sessions"):
        service.scheduler.check_new("c")
    for name in "ab":
        with pytest.raises(DuplicateSessionError, match="is open already"):
            service.scheduler.check_new(name)


def test_a_sequence_that_gives_up_waiting_gets_one_error_and_makes_way() -> None:
    service = FakeService(MEMORY)
    service.add("a", capacity=60)
    large, small = service.add("large", capacity=60), service.add("small", capacity=10)
    assert service.give_up("large") == [small]
    assert service.give_up("large") == []
    assert [type(error) for error in large.errors] == [CacheFullError]
    assert "--max-wait" in str(large.errors[0])
    assert "--cache-mib" in str(large.errors[0])
    assert large.has_failed
    assert service.remove("large") == []
    assert service.counts == (2, 0)


def test_a_sequence_that_has_failed_while_it_waited_gets_no_second_error() -> None:
    service = FakeService(MEMORY)
    service.add("a", capacity=60)
    waiting = service.add("b", capacity=60)
    waiting.fail(InvalidInputError("wrong"))
    service.give_up("b")
    assert [str(error) for error in waiting.errors] == ["wrong"]
    assert service.scheduler.num_waiting == 0


def test_giving_up_changes_nothing_for_a_sequence_that_does_not_wait() -> None:
    service = FakeService(MEMORY)
    sequence = service.add("a", capacity=60)
    assert service.give_up("a") == []
    assert service.give_up("unknown") == []
    assert not sequence.has_failed
    assert sequence.errors == []
    assert service.counts == (1, 0)


# Who is in the next batch


def test_round_robin_moves_a_batch_behind_all_others_which_keep_their_order() -> None:
    service = FakeService()
    first, second, third, fourth = (service.add(name) for name in "abcd")
    second.due = fourth.due = False
    assert [one.sequence for one in service.run_batch()] == [first, third]
    assert service.scheduler.runnable() == [second, fourth, first, third]


def test_a_batch_of_all_sequences_keeps_their_order() -> None:
    service = FakeService()
    sequences = [service.add(name) for name in "abc"]
    assert [one.sequence for one in service.run_batch()] == sequences
    assert service.scheduler.runnable() == sequences


def test_a_batch_takes_as_many_sequences_as_fit_and_the_next_one_the_others() -> None:
    service = FakeService(max_batch=2)
    for name in "abcde":
        service.add(name)
    assert [list(service.num_scheduled()) for _ in range(5)] == [
        ["a", "b"],
        ["c", "d"],
        ["e", "a"],
        ["b", "c"],
        ["d", "e"],
    ]


def test_only_open_sequences_that_have_not_failed_run() -> None:
    service = FakeService(MEMORY)
    sequence, waiting = service.add("a", capacity=60), service.add("b", capacity=60)
    assert service.scheduler.runnable() == [sequence]
    assert list(service.num_scheduled()) == ["a"]
    sequence.fail(InvalidInputError("wrong"))
    assert service.scheduler.runnable() == []
    assert service.run_batch() == []
    assert not waiting.has_failed


def test_without_due_sequences_there_is_no_batch() -> None:
    service = FakeService()
    assert service.run_batch() == []
    service.add("a").due = False
    assert service.run_batch() == []


def test_proposed_tokens_follow_the_last_known_one_and_each_has_an_output() -> None:
    service = FakeService(prefill_budget=2)
    service.add("a", [1, 2, 3], proposed=(7, 8))
    [first] = service.run_batch()
    assert (first.tokens, first.num_outputs, first.is_prefill) == ([1, 2], 0, True)
    [second] = service.run_batch()
    assert (second.tokens, second.num_outputs, second.is_prefill) == ([3, 7, 8], 3, True)


def test_the_batch_says_which_of_its_tokens_belong_to_a_prompt() -> None:
    service = FakeService()
    service.add("a", [1, 2, 3])
    [prompt] = service.run_batch()
    [decoded] = service.run_batch()
    assert (prompt.tokens, prompt.is_prefill) == ([1, 2, 3], True)
    assert (decoded.tokens, decoded.is_prefill) == ([NEXT], False)


# Chunked prefill


def test_the_prefill_budget_of_a_batch_goes_to_the_sequences_in_turn() -> None:
    service = FakeService(prefill_budget=40)
    for number, name in enumerate("abc"):
        service.add(name, [400 + number, *PROMPT[:29]])
    assert service.num_scheduled() == {"a": 30, "b": 10}
    assert service.num_scheduled() == {"c": 30, "a": 1, "b": 10}
    assert service.num_scheduled() == {"c": 1, "a": 1, "b": 10}


def test_a_sequence_that_decodes_takes_part_whatever_the_prefill_budget() -> None:
    service = FakeService(prefill_budget=20)
    decoding = service.add("decoding", PROMPT)
    service.compute(decoding)
    decoding.known.extend((1, 2))
    decoding.due = False
    service.add("prefill", [400, *PROMPT])
    assert service.num_scheduled() == {"prefill": 20}
    decoding.due = True
    [last, second] = sorted(service.run_batch(), key=lambda one: len(one.tokens))
    assert (last.tokens, last.num_outputs, last.is_prefill) == ([1, 2], 1, False)
    assert (len(second.tokens), second.is_prefill) == (20, True)


def test_a_sequence_that_decodes_takes_part_behind_one_that_uses_the_budget_up() -> None:
    service = FakeService(prefill_budget=20)
    service.add("prefill", [400, *PROMPT])
    decoding = service.add("decoding", PROMPT)
    service.compute(decoding)
    decoding.known.extend((1, 2))
    assert service.num_scheduled() == {"prefill": 20, "decoding": 2}


def test_a_sequence_far_behind_counts_as_prefill_though_it_is_no_prompt() -> None:
    service = FakeService(prefill_budget=30)
    sequence = service.add("a", PROMPT[:10])
    service.compute(sequence)
    sequence.known.extend(PROMPT[10:])
    other = service.add("b", [400, *PROMPT])
    first, *rest = service.run_batch()
    assert (first.sequence, first.tokens, first.num_outputs) == (sequence, PROMPT[10:40], 0)
    assert not first.is_prefill
    assert rest == []  # the budget is used up
    assert [one.sequence for one in service.run_batch()] == [other]


@pytest.mark.parametrize(("num_behind", "num_scheduled"), [(16, 16), (17, 10)])
def test_up_to_16_tokens_are_decoded_beside_the_budget(num_behind: int, num_scheduled: int) -> None:
    service = FakeService(prefill_budget=30)
    service.add("prefill", [400, *PROMPT[:19]])
    sequence = service.add("a", PROMPT[:10])
    service.compute(sequence)
    sequence.known.extend(PROMPT[10 : 10 + num_behind])
    assert service.num_scheduled() == {"prefill": 20, "a": num_scheduled}


def test_a_prefix_that_another_sequence_computes_in_this_batch_is_waited_for() -> None:
    service = FakeService(prefill_budget=1000)
    service.add("first", [*PROMPT, 1])
    second = service.add("second", [*PROMPT, 2])
    assert service.num_scheduled() == {"first": 101}
    service.scheduler["first"].due = False
    assert service.num_scheduled() == {"second": 1}
    assert service.cache.usage.num_cached == second.num_cached_tokens == 100


def test_a_prefix_too_short_to_copy_is_not_waited_for() -> None:
    service = FakeService(prefill_budget=1000)
    service.add("first", [*PROMPT[:15], *[500] * 10])
    service.add("second", [*PROMPT[:15], *[600] * 10])
    assert service.num_scheduled() == {"first": 25, "second": 25}


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    service = FakeService(prefill_budget=1000)
    service.compute(service.add("first", PROMPT))
    service.scheduler["first"].due = False
    second = service.add("second", PROMPT)
    [one] = service.run_batch()
    assert (one.tokens, one.num_outputs) == (PROMPT[-1:], 1)
    assert second.num_cached_tokens == 99


def test_the_prefix_of_a_removed_sequence_is_copied() -> None:
    service = FakeService(prefill_budget=1000)
    service.compute(service.add("first", PROMPT))
    service.remove("first")
    service.add("second", [*PROMPT, 7])
    assert service.num_scheduled() == {"second": 1}


def test_a_prompt_that_is_copied_as_a_whole_is_no_prefill() -> None:
    service = FakeService(prefill_budget=1000)
    service.compute(service.add("first", PROMPT))
    service.scheduler["first"].due = False
    lagging = service.add("lagging", PROMPT[:20])
    lagging.known.extend(PROMPT[20:])
    [one] = service.run_batch()
    assert (one.tokens, one.num_outputs, one.is_prefill) == (PROMPT[-1:], 1, False)


def test_without_prefix_reuse_no_sequence_waits_for_another() -> None:
    service = FakeService(prefill_budget=1000, reuses_prefixes=False)
    service.add("first", [*PROMPT, 1])
    service.add("second", [*PROMPT, 2])
    assert service.num_scheduled() == {"first": 101, "second": 101}


# The time of a batch


@given(st.floats(0.0, 10.0), st.lists(st.integers(1, 300), min_size=1, max_size=9))
def test_shares_add_up_to_the_whole_and_follow_the_tokens(
    seconds: float, num_tokens: list[int]
) -> None:
    parts = divide(seconds, num_tokens)
    assert sum(parts) == pytest.approx(seconds)
    assert all(
        part == pytest.approx(seconds * num / sum(num_tokens))
        for part, num in zip(parts, num_tokens, strict=True)
    )


def test_an_inconsistent_state_is_found() -> None:
    service = FakeService(MEMORY)
    sequence = service.add("a", capacity=60)
    slot, sequence.slot = slot_of(sequence), None
    with pytest.raises(AssertionError, match="neither open nor waiting"):
        service.scheduler.check_integrity()
    sequence.slot = slot
    waiting = service.add("b", capacity=60)
    waiting.slot = 99
    with pytest.raises(AssertionError, match="has memory and waits"):
        service.scheduler.check_integrity()
    assert make_sequence("c", [1], 10).is_runnable is False


# Sessions without a place


def test_sequences_without_a_place_in_the_last_batch_are_counted() -> None:
    service = FakeService(max_batch=2, limits=replace(LIMITS, max_sessions=8))
    sequences = [service.add(f"s{number}", [number]) for number in range(5)]
    assert service.scheduler.num_left_out == 0
    assert len(service.scheduler.schedule()) == 2
    assert service.scheduler.num_left_out == 3
    service.scheduler.check_integrity()
    for sequence in sequences[:2]:  # what the next batch leaves out
        service.scheduler.remove(sequence.session_id)
    assert service.scheduler.num_left_out == 3
    service.scheduler.remove("s4")
    assert service.scheduler.num_left_out == 2
    assert len(service.scheduler.schedule()) == 2
    assert service.scheduler.num_left_out == 0


def test_a_prompt_that_waits_for_its_turn_is_without_a_place() -> None:
    service = FakeService(prefill_budget=10)
    service.add("long", list(range(30)))
    service.add("other", list(range(100, 130)))
    assert len(service.scheduler.schedule()) == 1
    assert service.scheduler.num_left_out == 1


def test_a_sequence_that_has_nothing_to_compute_does_not_wait() -> None:
    service = FakeService(max_batch=1)
    for name in ("a", "b"):
        service.add(name, [1])
    service.scheduler["b"].due = False
    assert len(service.scheduler.schedule()) == 1
    assert service.scheduler.num_left_out == 0
    service.scheduler["a"].due = False
    assert not service.scheduler.schedule()
    assert service.scheduler.num_left_out == 0
