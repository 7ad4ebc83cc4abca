"""A pass that fails in the middle of the model, truncated and run again, changes no result."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from amusd.engine.interface import EngineOptions, Numerics, ScheduledSequence
from amusd.engine.kv.sequence_cache import CopyingCache
from amusd.engine.loading.model_source import LoadedModel, ModelSource, load_source
from amusd.engine.model_engine import ModelEngine, serve
from amusd.engine.reference import decode_autoregressive
from tests import tiny
from tests.engine.runners.test_padded import engine_of

pytestmark = pytest.mark.usefixtures("without_native_runner")

PROMPT = [i * 13 % 256 for i in range(1, 40)]
OTHER = [i * 7 % 256 for i in range(1, 20)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tiny.save(tiny.build("llama"), tmp_path_factory.mktemp("llama"))
    return load_source(ModelSource("tiny", folder))


def served(**options: Any) -> Callable[[LoadedModel], ModelEngine]:
    return lambda loaded: serve(loaded, EngineOptions(cache_mib=8, **options))


def only_transformers_cache(loaded: LoadedModel) -> ModelEngine:
    forward = loaded.model.forward

    def picky(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if cache is not None and not isinstance(cache, DynamicCache):
            raise TypeError("this model wants a DynamicCache")
        return forward(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaded.model, "forward", picky)
        engine = served(max_batch=1)(loaded)
        assert isinstance(engine._cache[engine.open(10)], CopyingCache)
        return engine


ENGINES = {
    "unbatched": served(max_batch=1),
    "ragged": served(max_batch=4),
    "exact": served(max_batch=4, numerics=Numerics.EXACT),
    "padded": engine_of,
    "copying": only_transformers_cache,
}


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("num_before", [0, 20])
def test_a_pass_that_fails_in_a_later_layer_can_be_run_again(
    loaded: LoadedModel, kind: str, num_before: int
) -> None:
    engine = ENGINES[kind](loaded)
    expected = [decode_autoregressive(engine, prompt, 6) for prompt in (PROMPT, OTHER)]
    slots = [engine.open(60), engine.open(60)]
    if num_before:
        engine.run([ScheduledSequence(slots[0], PROMPT[:num_before], 0)])
    fail_in_the_last_layer(loaded, engine, slots, num_before)
    assert [engine.length(slot) for slot in slots] == [num_before, 0]
    found = [
        finish(engine, slot, prompt) for slot, prompt in zip(slots, (PROMPT, OTHER), strict=True)
    ]
    assert found == expected


def fail_in_the_last_layer(
    loaded: LoadedModel, engine: ModelEngine, slots: list[int], num_before: int
) -> None:
    """Run a batch whose last layer raises, and truncate its sequences as they were."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("as on a device that is full")

    hook = loaded.model.model.layers[-1].register_forward_pre_hook(fail)
    batch = [
        ScheduledSequence(slots[0], PROMPT[num_before:], 1),
        ScheduledSequence(slots[1], OTHER, 1),
    ]
    lengths = [engine.length(slot) for slot in slots]
    with pytest.raises(torch.OutOfMemoryError):
        engine.run(batch)
    hook.remove()
    for slot, length in zip(slots, lengths, strict=True):
        engine.truncate(slot, length)


def finish(engine: ModelEngine, slot: int, prompt: list[int]) -> list[int]:
    """Return the 6 tokens after ``prompt``, of which the slot holds a part."""
    tokens: list[int] = []
    pending = prompt[engine.length(slot) :]
    while len(tokens) < 6:
        [[token]] = engine.run([ScheduledSequence(slot, pending, 1)])
        tokens.append(token)
        pending = [token]
    return tokens
