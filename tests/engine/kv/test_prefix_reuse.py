"""Prefix reuse: a copied prefix gives the same tokens as a computed one."""

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
    """The tokens after the prompt if nothing is reused."""
    options = EngineOptions(cache_mib=8, reuse_prefixes=False)
    return answer(load_engine(ModelSource("tiny", folder), options=options), 0)


def answer(engine: ModelEngine, num_cached: int, slot: int | None = None) -> list[int]:
    if slot is None:
        slot = engine.open(100)
        assert engine.reuse(slot, PROMPT) == num_cached
    pending, tokens = PROMPT[engine.length(slot) :], []
    for _ in range(20):
        [[token]] = engine.run([ScheduledSequence(slot, pending, 1)])
        tokens.append(token)
        pending = [token]
    engine.close(slot)
    return tokens


def test_a_prefix_of_a_closed_sequence_is_reused(engine: ModelEngine, folder: str) -> None:
    retained = engine.open(100)
    engine.run([ScheduledSequence(retained, [*SHARED, 1, 2], 1)])
    engine.close(retained)
    assert answer(engine, len(SHARED)) == expected_of(folder)


@pytest.mark.parametrize("what", ["rolled back", "closed", "both"])
def test_later_changes_of_the_donor_do_not_matter(
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


def test_later_changes_of_the_copy_do_not_matter_for_the_donor(
    engine: ModelEngine, folder: str
) -> None:
    donor, slot = engine.open(100), engine.open(100)
    engine.run([ScheduledSequence(donor, SHARED, 1)])
    engine.reuse(slot, PROMPT)
    engine.truncate(slot, 10)
    engine.run([ScheduledSequence(slot, [3] * 60, 1)])
    engine.close(slot)
    assert answer(engine, 0, donor) == expected_of(folder)


def test_only_tokens_that_the_donor_still_has_are_reused(engine: ModelEngine, folder: str) -> None:
    donor = engine.open(100)
    engine.run([ScheduledSequence(donor, SHARED, 1)])
    engine.truncate(donor, 30)
    assert answer(engine, 30) == expected_of(folder)


def test_prompt_tokens_count_as_computed_or_cached(engine: ModelEngine) -> None:
    first, second = engine.open(100), engine.open(100)
    engine.run([ScheduledSequence(first, SHARED, 1, is_prompt=True)])
    engine.run([ScheduledSequence(first, [1], 1)])
    engine.reuse(second, PROMPT)
    engine.run([ScheduledSequence(second, PROMPT[len(SHARED) :], 1, is_prompt=True)])
    assert (engine.usage.num_computed, engine.usage.num_cached) == (63, 60)


def test_layers_without_tokens_of_their_own_are_not_copied() -> None:
    donor, target = SequenceCache(3, 20), SequenceCache(3, 30)
    states = torch.randn(1, 2, 8, 4)
    donor.update(states, states, 1)  # layers 0 and 2 use the keys and values of layer 1
    target.copy_prefix(donor, 5)
    assert target.length == 5
    assert [layer.is_initialized for layer in target._own_layers] == [False, True, False]
    keys, _ = target.update(states[:, :, 5:], states[:, :, 5:], 1)
    assert torch.equal(keys, states)
    target.copy_prefix(SequenceCache(3, 20), 0)
    assert target.length == 8
