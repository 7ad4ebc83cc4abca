"""How prompts are read: budgets, turns, common beginnings, and passes that fail."""

from collections.abc import Sequence

import pytest

from amusd.engine.interface import EngineOptions, ScheduledSequence
from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from amusd.protocol.errors import LimitExceededError
from amusd.serving.chunked_prefill import PromptReader, run_pass

PROMPT = list(range(100))


def make_engine(reuses: bool = True) -> SyntheticEngine:
    options = EngineOptions(reuse_prefixes=reuses)
    return SyntheticEngine(SyntheticModel(vocabulary=500), options=options)


def read(engine: SyntheticEngine, reader: PromptReader, *tasks: tuple[int, list[int]]) -> list[int]:
    """Run one pass over slots and their prompts; return how much each has read of its own."""
    reader.begin_pass()
    pieces = [(slot, reader.next_piece(slot, text, len(text))) for slot, text in tasks]
    feeds = [
        ScheduledSequence(slot, piece.tokens, 0, piece.is_prompt)
        for slot, piece in pieces
        if piece.tokens
    ]
    run_pass(engine, feeds)
    return [len(piece.tokens) for _, piece in pieces]


def test_the_budget_of_a_pass_goes_to_those_who_ask_first() -> None:
    engine = make_engine()
    reader = PromptReader(engine, tokens_per_pass=40)
    first, second, third = (engine.open(200) for _ in range(3))
    texts = [[400 + number, *PROMPT[:29]] for number in range(3)]
    tasks = list(zip((first, second, third), texts, strict=True))
    assert read(engine, reader, *tasks) == [30, 10, 0]
    assert read(engine, reader, *tasks[1:]) == [20, 20]


def test_who_is_done_with_the_prompt_takes_part_whatever_the_budget() -> None:
    engine = make_engine()
    reader = PromptReader(engine, tokens_per_pass=20)
    decoding, reading = engine.open(200), engine.open(200)
    engine.run([ScheduledSequence(decoding, PROMPT, 1)])
    reader.begin_pass()
    assert len(reader.next_piece(reading, [400, *PROMPT], 101).tokens) == 20
    piece = reader.next_piece(decoding, [*PROMPT, 1, 2], 100)
    assert (piece.tokens, piece.is_last, piece.is_prompt) == ([1, 2], True, False)


def test_far_behind_the_budget_counts_for_what_is_no_prompt_too() -> None:
    engine = make_engine()
    reader = PromptReader(engine, tokens_per_pass=30)
    slot = engine.open(200)
    engine.run([ScheduledSequence(slot, PROMPT[:10], 1)])
    reader.begin_pass()
    piece = reader.next_piece(slot, PROMPT, 10)
    assert (piece.tokens, piece.is_last, piece.is_prompt) == (PROMPT[10:40], False, False)


def test_a_beginning_that_another_reads_in_this_pass_is_waited_for() -> None:
    engine = make_engine()
    reader = PromptReader(engine, tokens_per_pass=1000)
    first, second = engine.open(200), engine.open(200)
    tasks = ((first, [*PROMPT, 1]), (second, [*PROMPT, 2]))
    assert read(engine, reader, *tasks) == [101, 0]
    assert read(engine, reader, tasks[1]) == [1]
    assert engine.usage.num_cached == 100


def test_without_reuse_nobody_waits_for_another() -> None:
    engine = make_engine(reuses=False)
    reader = PromptReader(engine, tokens_per_pass=1000, reuses=False)
    tasks = ((engine.open(200), [*PROMPT, 1]), (engine.open(200), [*PROMPT, 2]))
    assert read(engine, reader, *tasks) == [101, 101]


class BreakingEngine(SyntheticEngine):
    """Takes the tokens, and then fails."""

    def run(self, feeds: Sequence[ScheduledSequence]) -> list[list[int]]:
        super().run(feeds)
        raise LimitExceededError("no memory left")


def test_what_a_failed_pass_left_behind_is_not_reused() -> None:
    engine = BreakingEngine(SyntheticModel(vocabulary=500))
    slot = engine.open(200)
    with pytest.raises(LimitExceededError):
        run_pass(engine, [ScheduledSequence(slot, PROMPT, 0)])
    assert engine.length(slot) == 0
    engine.close(slot)
    assert engine.reuse(engine.open(200), [*PROMPT, 1]) == 0
