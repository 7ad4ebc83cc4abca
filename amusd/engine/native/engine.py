"""Passes of Llama-like models on CPU in float32, in C: one call a pass, many sessions in it.

What a token's result is made of never depends on what shares its pass, so this engine is exact
as it is. Threads share the weights' panels; each output is still summed by one of them.
"""

import itertools
import weakref
from collections.abc import Sequence
from ctypes import byref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amusd.core.model import CacheUsage, ModelDescription
from amusd.engine.interface import EngineOptions, Feed
from amusd.engine.memory import free_bytes
from amusd.engine.native.library import LANES, Pass, padded
from amusd.engine.native.model import NativeModel
from amusd.engine.slot_memory import SlotMemory

_MOST_GROUP = 4  # query heads whose scores a thread keeps at once


@dataclass(slots=True)
class SlotBuffer:
    """Keys and values of one slot.

    ``keys`` [layers * kv_heads, capacity / 16, head_dim, 16], ``values`` [layers * kv_heads,
    capacity, head_dim].
    """

    keys: Tensor
    values: Tensor

    def copy_rows(self, donor: "SlotBuffer", length: int) -> None:
        """Take the first ``length`` tokens of another buffer."""
        blocks = -(-length // LANES)
        self.keys[:, :blocks] = donor.keys[:, :blocks]
        self.values[:, :length] = donor.values[:, :length]


class NativeEngine:
    """Greedy passes of a native model over slots of its own."""

    def __init__(
        self,
        model: NativeModel,
        description: ModelDescription,
        options: EngineOptions,
        num_threads: int = 1,
    ) -> None:
        """Serve ``model`` with ``num_threads`` threads, the calling one among them."""
        self._model = model
        self.description = description
        self.max_batch = options.max_batch
        self._num_threads = num_threads
        self._team = model.functions.amusd_team_open(num_threads)
        if not self._team:
            raise MemoryError(f"cannot start {num_threads} threads")
        weakref.finalize(self, model.functions.amusd_team_close, self._team)
        self._workspace = _Workspace(model, description.context_length, num_threads, 1)
        cache_bytes = options.cache_mib << 20 or free_bytes("cpu") // 2
        self._slots = SlotMemory(
            max(1, cache_bytes // (8 * model.num_key_rows * model.head_dim)),
            description.context_length,
            make=self._make_buffer,
            copy=_copy_rows if options.reuse_prefixes else None,
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a pass reads."""
        return self._model.weight_bytes

    @property
    def num_open(self) -> int:
        """Number of open slots."""
        return len(self._slots)

    @property
    def usage(self) -> CacheUsage:
        """How much memory for keys and values is in use."""
        return self._slots.usage

    def open(self, capacity: int) -> int:
        """Return a new empty slot for at most ``capacity`` tokens."""
        return self._slots.open(capacity)

    def length(self, slot: int) -> int:
        """Return how many tokens the slot holds."""
        return self._slots.length(slot)

    def reuse(self, slot: int, tokens: Sequence[int]) -> int:
        """Take over what another slot holds of the beginning of ``tokens``, but the last one."""
        return self._slots.reuse(slot, tokens)

    def truncate(self, slot: int, length: int) -> None:
        """Forget what the slot holds beyond ``length`` tokens."""
        self._slots.truncate(slot, length)

    def close(self, slot: int) -> None:
        """Free the slot's keys and values."""
        self._slots.close(slot)

    def run(self, feeds: Sequence[Feed]) -> list[list[int]]:
        """Run all feeds in one pass; return the greedy tokens of each."""
        found = iter(self._forward(feeds)[0])
        return [list(itertools.islice(found, feed.num_outputs)) for feed in feeds]

    def logits(self, feeds: Sequence[Feed]) -> Tensor:
        """Run all feeds in one pass; return the logits of all outputs, [outputs, head]."""
        logits = self._forward(feeds, with_logits=True)[1]
        assert logits is not None
        return logits

    def _forward(
        self, feeds: Sequence[Feed], with_logits: bool = False
    ) -> tuple[list[int], Tensor | None]:
        starts = [self._slots.length(feed.slot) for feed in feeds]
        for feed in feeds:
            self._slots.extend(feed.slot, feed.tokens, feed.is_prompt)
        places = np.array(
            [
                (*self._address(feed.slot), position)
                for feed, start in zip(feeds, starts, strict=True)
                for position in range(start, start + len(feed.tokens))
            ],
            dtype=np.int64,
        )
        ends = itertools.accumulate(len(feed.tokens) for feed in feeds)
        wanted = np.array(
            [
                row
                for end, feed in zip(ends, feeds, strict=True)
                for row in range(end - feed.num_outputs, end)
            ],
            dtype=np.int64,
        )
        if len(places) > self._workspace.num_tokens:
            self._workspace = _Workspace(
                self._model, self.description.context_length, self._num_threads, len(places)
            )
        ids = [token for feed in feeds for token in feed.tokens]
        return self._call(ids, places, wanted, with_logits)

    def _call(
        self, ids: list[int], places: Any, wanted: Any, with_logits: bool
    ) -> tuple[list[int], Tensor | None]:
        work, model, count = self._workspace, self._model, len(wanted)
        model.embed(ids, work.hidden)
        logits = torch.empty(count, model.num_outputs) if with_logits else None
        request = work.request
        request.tokens = places.ctypes.data
        request.wanted = wanted.ctypes.data
        request.logits = None if logits is None else logits.data_ptr()
        request.num_tokens, request.num_wanted = len(ids), count
        model.functions.amusd_forward(self._team, byref(model.structure), byref(request))
        return work.answers(count, model.head_ids), logits

    def _make_buffer(self, capacity: int) -> SlotBuffer:
        rows, dim, blocks = self._model.num_key_rows, self._model.head_dim, -(-capacity // LANES)
        return SlotBuffer(
            torch.empty(rows, blocks, dim, LANES), torch.empty(rows, blocks * LANES, dim)
        )

    def _address(self, slot: int) -> tuple[int, int, int]:
        buffer = self._slots[slot]
        return buffer.keys.data_ptr(), buffer.values.data_ptr(), buffer.values.shape[1]


class _Workspace:
    """Buffers for passes over up to ``num_tokens`` tokens."""

    def __init__(
        self, model: NativeModel, context_length: int, num_threads: int, num_tokens: int
    ) -> None:
        self.num_tokens = num_tokens
        widths = {
            "hidden": model.hidden,
            "normed": model.hidden,
            "qkv": (model.num_heads + 2 * model.num_kv_heads) * model.head_dim,
            "attended": model.num_heads * model.head_dim,
            "gate_up": 2 * model.intermediate,
            "mixed": model.intermediate,
        }
        self._buffers = {
            name: torch.zeros(num_tokens, padded(width)) for name, width in widths.items()
        }
        widest = padded(max(widths["attended"], model.hidden, model.intermediate))
        scratch_size = max(
            padded(1) * (widest + num_tokens), _MOST_GROUP * (context_length + LANES)
        )
        self._scratch = torch.zeros(num_threads, scratch_size)
        self._best = torch.zeros(num_threads * num_tokens)
        self._ids = torch.zeros(num_threads * num_tokens, dtype=torch.int64)
        self._num_threads = num_threads
        self.request = Pass(
            scratch=self._scratch.data_ptr(),
            best=self._best.data_ptr(),
            ids=self._ids.data_ptr(),
            scratch_size=scratch_size,
            **{name: buffer.data_ptr() for name, buffer in self._buffers.items()},
        )

    @property
    def hidden(self) -> Tensor:
        """Where a pass takes embeddings from, [num_tokens, padded hidden]."""
        return self._buffers["hidden"]

    def answers(self, count: int, head_ids: Tensor | None) -> list[int]:
        """Return the ids of the largest logits; each thread has found that of its part."""
        best = self._best[: self._num_threads * count].view(self._num_threads, count)
        ids = self._ids[: self._num_threads * count].view(self._num_threads, count)
        if self._num_threads > 1:
            ids = ids.gather(0, best.argmax(0, keepdim=True))
        tokens = ids[0] if head_ids is None else head_ids[ids[0]]
        return [int(token) for token in tokens.tolist()]


def _copy_rows(donor: SlotBuffer, target: SlotBuffer, length: int) -> None:
    target.copy_rows(donor, length)
