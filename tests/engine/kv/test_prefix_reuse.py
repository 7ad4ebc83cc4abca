"""Beginnings that are copied instead of computed: nobody can tell."""

from pathlib import Path

import pytest
import torch

from amusd.engine.interface import EngineOptions, ScheduledSequence
from amusd.engine.kv.sequence_cache import SequenceCache
from amusd.engine.loading.model_source import ModelSource
from amusd.engine.model_engine import ModelEngine, load_engine
from tests import tiny

pytestmark = pytest.mark.usefixtures("without_native_runner")

FAMILIES = ["llama", "qwen2", "mistral", "gpt2"]
SHARED = [i * 11 % 256 for i in range(1, 61)]
PROMPT = [*SHARED, 9, 8, 7]


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return tiny.save(tiny.build(request.param), tmp_path)


@pytest.fixture(params=[1, 4])
def engine(request: pytest.FixtureRequest, folder: str) -> ModelEngine:
    options = EngineOptions(max_batch=request.param, cache_mib=8)
    return load_engine(ModelSource("tiny", folder), options=options)


def expected_of(folder: str) -> list[int]:
    """What follows the prompt where nothing is reused."""
    options = EngineOptions(cache_mib=8, reuse_prefixes=False)
    return answer(load_engine(ModelSource("tiny", folder), options=options), 0)


def answer(engine: ModelEngine, num_cached: int, slot: int | None = None) -> list[int]:
    if slot is None:
        slot = engine.open(100)
        assert engine.reuse(slot, PROMPT) == num_cached
    unread, tokens = PROMPT[engine.length(slot) :], []
    for _ in range(20):
        [[token]] = engine.run([ScheduledSequence(slot, unread, 1)])
        tokens.append(token)
        unread = [token]
    engine.close(slot)
    return tokens


def test_a_beginning_of_a_closed_session_is_reused(engine: ModelEngine, folder: str) -> None:
    kept = engine.open(100)
    engine.run([ScheduledSequence(kept, [*SHARED, 1, 2], 1)])
    engine.close(kept)
    assert answer(engine, len(SHARED)) == expected_of(folder)


@pytest.mark.parametrize("what", ["rolled back", "closed", "both"])
def test_what_becomes_of_the_donor_changes_nothing(
    engine: ModelEngine, folder: str, what: str
) -> None:
    donor, slot = engine.open(100), engine.open(100)
    engine.run([ScheduledSequence(donor, [*SHARED, 1, 2], 1)])
    assert engine.reuse(slot, PROMPT) == len(SHARED)
    if what != "closed":
        engine.truncate(donor, 5)
        engine.run([ScheduledSequence(donor, [3] * 40, 1)])
    if what != "rolled back":
        engine.close(donor)
    assert answer(engine, 0, slot) == expected_of(folder)


def test_what_becomes_of_the_copy_changes_nothing_for_the_donor(
    engine: ModelEngine, folder: str
) -> None:
    donor, slot = engine.open(100), engine.open(100)
    engine.run([ScheduledSequence(donor, SHARED, 1)])
    engine.reuse(slot, PROMPT)
    engine.truncate(slot, 10)
    engine.run([ScheduledSequence(slot, [3] * 60, 1)])
    engine.close(slot)
    assert answer(engine, 0, donor) == expected_of(folder)


def test_only_what_the_donor_still_holds_is_reused(engine: ModelEngine, folder: str) -> None:
    donor = engine.open(100)
    engine.run([ScheduledSequence(donor, SHARED, 1)])
    engine.truncate(donor, 30)
    assert answer(engine, 30) == expected_of(folder)


def test_prompts_count_as_read_or_reused(engine: ModelEngine) -> None:
    first, second = engine.open(100), engine.open(100)
    engine.run([ScheduledSequence(first, SHARED, 1, is_prompt=True)])
    engine.run([ScheduledSequence(first, [1], 1)])
    engine.reuse(second, PROMPT)
    engine.run([ScheduledSequence(second, PROMPT[len(SHARED) :], 1, is_prompt=True)])
    assert (engine.usage.num_computed, engine.usage.num_cached) == (63, 60)


def test_layers_without_rows_of_their_own_are_left_alone() -> None:
    donor, target = SequenceCache(3, 20), SequenceCache(3, 30)
    states = torch.randn(1, 2, 8, 4)
    donor.update(states, states, 1)  # layers 0 and 2 use what layer 1 holds
    target.copy_prefix(donor, 5)
    assert target.length == 5
    assert [layer.is_initialized for layer in target._slot_layers] == [False, True, False]
    keys, _ = target.update(states[:, :, 5:], states[:, :, 5:], 1)
    assert torch.equal(keys, states)
    target.copy_prefix(SequenceCache(3, 20), 0)
    assert target.length == 8
