"""Every kind of pool: none loses memory, whatever order texts are opened and closed in.

The model is a plain list of texts. Keys and values are the tokens themselves, so a wrong copy
shows. No pass is run.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor
from transformers.cache_utils import Cache

from amusd.engine.interface import EngineOptions, WeightFormat
from amusd.engine.kv.cache_manager import MIN_CACHED, KVCacheManager
from amusd.engine.native.library import unavailable_reason
from amusd.engine.native.native_model import NativeModel
from amusd.engine.native.native_runner import NativeRunner
from amusd.engine.no_model import NoModel
from amusd.engine.runners.padded import PaddedRunner
from amusd.engine.runners.ragged import RaggedRunner
from amusd.engine.runners.runner import ModelRunner
from amusd.engine.runners.shape_buckets import Buckets
from amusd.engine.runners.unbatched import UnbatchedRunner
from amusd.engine.sampling.sampler import GREEDY
from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from amusd.protocol.errors import CacheFullError
from tests import tiny

ROWS, LENGTH = 8, 64
MAX_TOKENS = ROWS * LENGTH


class Pool(Protocol):
    """A manager, how its buffers are written and read, and what else it has to hold."""

    manager: KVCacheManager[Any]

    def write(self, buffer: Any, start: int, tokens: Sequence[int]) -> None:
        """Write the keys and values of tokens."""

    def read(self, buffer: Any, length: int) -> list[int]:
        """Return the tokens whose keys and values a buffer holds."""

    def check(self, num_buffers: int) -> None:
        """Check the pool's own account, for this many buffers in use."""


class RunnerPool:
    """The buffers of a model runner."""

    def __init__(self, runner: ModelRunner[Any], unit: int = 1, copies: bool = True) -> None:
        self.runner = runner
        self.manager = KVCacheManager(
            MAX_TOKENS,
            LENGTH,
            allocate=runner.allocate,
            copy=runner.copy if copies else None,
            free=runner.free,
            unit=unit,
        )

    def check(self, num_buffers: int) -> None:
        """A buffer is freed with its last reference."""


class LayerPool(RunnerPool):
    """Buffers that are caches of Transformers."""

    def write(self, buffer: Cache, start: int, tokens: Sequence[int]) -> None:
        buffer.truncate(start)  # type: ignore[attr-defined]
        states = as_states(tokens)
        for layer in range(2):
            buffer.update(states, states + layer, layer)

    def read(self, buffer: Cache, length: int) -> list[int]:
        if not length:
            return []
        layers: list[Any] = list(buffer.layers)
        tokens = [int(token) for token in layers[0].keys[0, 0, :length, 0]]
        assert [int(token) - 1 for token in layers[1].values[0, 1, :length, 0]] == tokens
        return tokens


class PaddedRows(RunnerPool):
    """The rows of a padded runner: as many as sessions, each used once at a time."""

    runner: PaddedRunner

    def write(self, buffer: int, start: int, tokens: Sequence[int]) -> None:
        states = as_states(tokens)
        for layer in range(2):
            for part in self.runner._pool.layer(layer, states, states):
                part[buffer, :, start : start + len(tokens)] = states[0] + layer

    def read(self, buffer: int, length: int) -> list[int]:
        if not length:
            return []
        keys, _ = self.runner._pool.layer(1, as_states([0]), as_states([0]))
        return [int(token) - 1 for token in keys[buffer, 0, :length, 0]]

    def check(self, num_buffers: int) -> None:
        free = self.runner._free
        assert len(set(free)) == len(free)
        assert len(free) + num_buffers == self.runner.num_rows


class NativeBuffers(RunnerPool):
    """Buffers of the native runner: keys in blocks of 16 tokens."""

    def write(self, buffer: Any, start: int, tokens: Sequence[int]) -> None:
        for position, token in enumerate(tokens, start):
            buffer.keys[:, position // 16, :, position % 16] = token
            buffer.values[:, position] = token

    def read(self, buffer: Any, length: int) -> list[int]:
        keys = buffer.keys.transpose(2, 3).flatten(1, 2)  # [rows, tokens, head_dim]
        assert torch.equal(keys[:, :length, 0], buffer.values[:, :length, 0])
        return [int(token) for token in keys[-1, :length, 0]]


class ListPool:
    """The lists of a synthetic engine."""

    def __init__(self) -> None:
        engine = SyntheticEngine(SyntheticModel(memory=MAX_TOKENS, context=LENGTH))
        self.manager: KVCacheManager[Any] = engine._cache

    def write(self, buffer: list[int], start: int, tokens: Sequence[int]) -> None:
        buffer[start:] = tokens

    def read(self, buffer: list[int], length: int) -> list[int]:
        return buffer[:length]

    def check(self, num_buffers: int) -> None:
        """A list is freed with its last reference."""


class DraftSlots(ListPool):
    """The slots of a draft service without a model: memory for indices, nothing to reuse."""

    def __init__(self) -> None:
        self.texts: dict[int, list[int]] = {}
        options = EngineOptions(cache_mib=1, index_bytes=(1 << 20) // MAX_TOKENS)
        self.manager = NoModel(options)._slots

    def write(self, buffer: object, start: int, tokens: Sequence[int]) -> None:
        self.texts.setdefault(id(buffer), [])[start:] = tokens

    def read(self, buffer: object, length: int) -> list[int]:
        return self.texts.setdefault(id(buffer), [])[:length]


def as_states(tokens: Sequence[int]) -> Tensor:
    """Return keys of a layer, [1, kv_heads, tokens, head_dim], all with the number of the token."""
    return torch.tensor(list(tokens), dtype=torch.float32)[None, None, :, None].expand(1, 2, -1, 16)


MODEL = tiny.build("llama")
NATIVE = None if unavailable_reason() else NativeModel(MODEL, WeightFormat.COMPACT)


def native_buffers() -> Pool:
    assert NATIVE is not None
    return NativeBuffers(NativeRunner(NATIVE, GREEDY, LENGTH))


POOLS: dict[str, Callable[[], Pool]] = {
    "ragged": lambda: LayerPool(RaggedRunner(MODEL)),
    "unbatched": lambda: LayerPool(UnbatchedRunner(MODEL)),
    "copying cache": lambda: LayerPool(UnbatchedRunner(MODEL, copying_cache=True), copies=False),
    "padded": lambda: PaddedRows(PaddedRunner(MODEL, Buckets.fast(ROWS, LENGTH)), unit=LENGTH),
    "padded, no reuse": lambda: PaddedRows(
        PaddedRunner(MODEL, Buckets.fast(ROWS, LENGTH)), unit=LENGTH, copies=False
    ),
    "native": native_buffers,
    "synthetic": ListPool,
    "draft slots": DraftSlots,
}


class AnyOrder(RuleBasedStateMachine):
    """Open, reuse, write, roll back and close in any order."""

    make_pool: Callable[[], Pool]

    @initialize()
    def start(self) -> None:
        self.pool = self.make_pool()
        self.manager = self.pool.manager
        self.texts: dict[int, list[int]] = {}
        self.capacities: dict[int, int] = {}

    def reserved(self, capacity: int) -> int:
        unit = self.manager._unit
        return -(-capacity // unit) * unit

    @rule(capacity=st.integers(1, LENGTH))
    def open(self, capacity: int) -> None:
        """Retained buffers give way to a sequence that fits beside the open ones."""
        in_use = sum(map(self.reserved, self.capacities.values()))
        if in_use + self.reserved(capacity) > MAX_TOKENS:
            with pytest.raises(CacheFullError):
                self.manager.open(capacity)
            return
        slot = self.manager.open(capacity)
        self.texts[slot], self.capacities[slot] = [], capacity

    @precondition(lambda self: self.texts)
    @rule(
        data=st.data(),
        start=st.sampled_from([0, 1, 200]),
        length=st.integers(1, LENGTH),
    )
    def prefill(self, data: st.DataObject, start: int, length: int) -> None:
        """Three texts only, in any length: they repeat and continue one another."""
        slot = data.draw(st.sampled_from(list(self.texts)), label="slot")
        wanted = list(range(start, start + min(length, self.capacities[slot])))
        held = self.texts[slot]
        if wanted[: len(held)] != held or len(wanted) <= len(held):
            return
        num_cached = self.manager.reuse(slot, wanted)
        assert num_cached == 0 or num_cached >= MIN_CACHED
        first = len(held) + num_cached
        assert first < len(wanted)
        self.manager.extend(slot, wanted[first:], is_prompt=True)
        self.pool.write(self.manager[slot], first, wanted[first:])
        self.texts[slot] = wanted

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(list(self.texts)), label="slot")
        length = data.draw(st.integers(0, len(self.texts[slot])), label="length")
        self.manager.truncate(slot, length)
        del self.texts[slot][length:]

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(list(self.texts)), label="slot")
        self.manager.close(slot)
        del self.texts[slot], self.capacities[slot]

    @rule()
    def close_all(self) -> None:
        for slot in list(self.texts):
            self.manager.close(slot)
        self.texts.clear()
        self.capacities.clear()

    @invariant()
    def nothing_is_lost(self) -> None:
        manager = self.manager
        manager.check_integrity()
        self.pool.check(len(manager._open) + len(manager._retained))
        assert manager.usage.num_reserved == sum(map(self.reserved, self.capacities.values()))
        for slot, text in self.texts.items():
            assert self.pool.read(manager[slot], manager.length(slot)) == text

    def teardown(self) -> None:
        """As many sequences as ever can be open in the end."""
        if hasattr(self, "texts"):
            self.close_all()
            for _ in range(ROWS):
                self.manager.open(LENGTH)
            assert self.manager.usage.num_retained == 0
            self.manager.check_integrity()
            self.pool.check(ROWS)


@pytest.mark.parametrize("kind", POOLS)
def test_no_pool_loses_memory_in_any_order_of_opening_and_closing(kind: str) -> None:
    if kind == "native" and NATIVE is None:
        pytest.skip("no native engine")

    class Case(AnyOrder):
        make_pool = staticmethod(POOLS[kind])

    laws = settings(max_examples=60, stateful_step_count=30, deadline=None)
    with torch.inference_mode():
        run_state_machine_as_test(Case, settings=laws)
