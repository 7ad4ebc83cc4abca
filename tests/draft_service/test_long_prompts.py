"""Long prompts and n-gram lookup: read in pieces between steps, within the memory of the cache."""

import random
import tracemalloc
from dataclasses import replace

import pytest

from amusd.engine.interface import EngineOptions
from amusd.engine.no_model import NoModel
from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from amusd.fleet.model_description import ServiceLimits
from amusd.protocol.draft_limits import DraftLimits
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.errors import CacheFullError, InvalidInputError
from draft_service.drafters import MAX_UNREAD, NgramProposer, model_drafter, ngram_drafter
from draft_service.drafting import _READ_BUDGET, DraftOpening, DraftWorker
from draft_service.ngram_index import BYTES_PER_TOKEN, NgramIndex
from tests.draft_service.draft_receiver import opened, run

LIMITS = ServiceLimits(max_sessions=8, max_context=100_000, max_lookahead=8, max_waiting=4)
NEW = [token * 7 % 30_011 for token in range(5000)]  # no run occurs twice
LONG = [*NEW, *NEW[100:104]]
FOUND = NEW[104:108]


def opening(name: str, tokens: list[int]) -> DraftOpening:
    return DraftOpening(name, tokens, DraftLimits(4, len(tokens) + 50, tokens_per_proposal=4))


class CountingProposer(NgramProposer):
    """Remembers how many tokens it read since it was last asked about that."""

    def __init__(self) -> None:
        super().__init__(min_match=2)
        self.num_read = 0

    def read(self, session_id: str, tokens: list[int], most: int) -> int:
        before = super().read(session_id, tokens, 0)
        left = super().read(session_id, tokens, most)
        self.num_read += before - left
        return left


def test_no_step_reads_more_than_its_budget_however_many_long_prompts_there_are() -> None:
    proposer = CountingProposer()
    worker = DraftWorker(replace(ngram_drafter(), proposers=(proposer,)), LIMITS, 100)
    receivers = [opened(worker, opening(name, LONG)) for name in "abc"]
    num_steps = 0
    while worker.step():
        assert proposer.num_read <= _READ_BUDGET
        proposer.num_read, num_steps = 0, num_steps + 1
    assert num_steps >= 3 * len(LONG) // _READ_BUDGET
    assert [receiver.tokens for receiver in receivers] == [FOUND] * 3


def test_a_session_goes_on_while_the_prompt_of_another_is_read() -> None:
    worker = DraftWorker(ngram_drafter(), LIMITS, 100)
    opened(worker, opening("long", LONG))
    worker.step()
    short = opened(worker, opening("short", [1, 2, 3, 4, 5, 1, 2]))
    worker.step()
    assert short.tokens == [3, 4, 5, 1]


def test_without_a_model_nothing_is_said_before_the_prompt_is_read() -> None:
    worker = DraftWorker(ngram_drafter(), LIMITS, 100)
    receiver = opened(worker, opening("a", LONG))
    for _ in range(len(LONG) // _READ_BUDGET - 1):
        assert worker.step()
        assert receiver.proposals == []
    run(worker)
    assert [proposal.tokens for proposal in receiver.proposals] == [tuple(FOUND)]


def test_a_model_drafts_while_the_prompt_is_read() -> None:
    engine = SyntheticEngine(SyntheticModel(vocabulary=30_011, context=100_000))
    worker = DraftWorker(model_drafter(engine, with_ngrams=True), LIMITS, 100_000)
    receiver = opened(worker, opening("a", LONG))
    worker.step()
    run(worker)
    assert {proposal.source for proposal in receiver.proposals} == {DraftSource.MODEL}


def test_a_closed_session_leaves_nothing_to_read() -> None:
    worker = DraftWorker(ngram_drafter(), LIMITS, 100)
    opened(worker, opening("a", LONG))
    assert worker.step()
    worker.close("a")
    assert not worker.step()


@pytest.mark.parametrize("piece", [1, 100, MAX_UNREAD, 4096])
def test_an_index_is_the_same_whatever_the_pieces(piece: int) -> None:
    index = NgramIndex(2, 4)
    while index.num_missing(LONG):
        index.extend(LONG, piece)
    assert index.continuation(LONG, 4) == FOUND
    index.truncate(60)
    assert index.num_missing(LONG) == len(LONG) - 61
    assert index.continuation(LONG[:63], 4) == []


@pytest.mark.parametrize("num_tokens", [5_000, 11_000, 22_000])  # before and after a table grows
def test_an_index_takes_no_more_memory_than_it_is_counted_with(num_tokens: int) -> None:
    source = random.Random(1)
    tokens = [source.randrange(1 << 30) for _ in range(num_tokens)]
    tracemalloc.start()
    try:
        index = NgramIndex(2, 4)
        index.extend(tokens, num_tokens)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert BYTES_PER_TOKEN / 2 < used / num_tokens < BYTES_PER_TOKEN


def test_without_a_model_the_indices_have_the_memory_of_the_cache() -> None:
    engine = NoModel(EngineOptions(cache_mib=1, index_bytes=1024))
    assert engine.usage.max_tokens == 1024
    slot = engine.open(1000)
    with pytest.raises(CacheFullError):
        engine.open(25)
    with pytest.raises(InvalidInputError, match="--cache-mib"):
        engine.open(1025)
    engine.close(slot)
    assert (engine.num_open, engine.usage.num_reserved) == (0, 0)


def test_a_session_without_memory_for_its_index_waits_and_then_drafts() -> None:
    worker = DraftWorker(ngram_drafter(EngineOptions(cache_mib=3)), LIMITS, 100)
    first = opened(worker, opening("first", LONG))
    second = opened(worker, opening("second", LONG))
    assert worker.num_waiting == 1
    run(worker)
    assert (first.tokens, second.tokens) == (FOUND, [])
    worker.close("first")
    run(worker)
    assert second.tokens == FOUND
