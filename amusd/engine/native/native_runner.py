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
import numpy.typing as npt
import torch
from torch import Tensor

from amusd.engine.native.library import LANES, Pass, padded
from amusd.engine.native.native_model import NativeModel
from amusd.engine.runners.runner import Chunk
from amusd.engine.sampling.sampler import Sampler

_MOST_GROUP = 4  # query heads whose scores a thread keeps at once


@dataclass(slots=True)
class NativeCache:
    """Keys and values of one slot.

    ``keys`` [layers * kv_heads, capacity / 16, head_dim, 16], ``values`` [layers * kv_heads,
    capacity, head_dim].
    """

    keys: Tensor
    values: Tensor

    @property
    def address(self) -> tuple[int, int, int]:
        """Where keys and values lie, and for how many tokens."""
        return self.keys.data_ptr(), self.values.data_ptr(), self.values.shape[1]


class NativeRunner:
    """Runs a batch of a native model in one C call, with ``num_threads`` threads."""

    name = "native"

    def __init__(
        self, model: NativeModel, sampler: Sampler, context_length: int, num_threads: int = 1
    ) -> None:
        """Run ``model`` over slots of up to ``context_length`` tokens.

        ``num_threads`` counts the calling thread.
        """
        self._model = model
        self._sampler = sampler
        self._context_length = context_length
        self._num_threads = num_threads
        self._team = model.functions.amusd_team_open(num_threads)
        if not self._team:
            raise MemoryError(f"cannot start {num_threads} threads")
        weakref.finalize(self, model.functions.amusd_team_close, self._team)
        self._workspace = _Workspace(model, context_length, num_threads, 1)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a pass reads."""
        return self._model.weight_bytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes that keys and values of a token take."""
        return 2 * 4 * self._model.num_key_rows * self._model.head_dim

    @property
    def weight_format(self) -> str:
        """How the weights are kept."""
        return self._model.weight_format

    @property
    def family(self) -> str:
        """The family of the model's architecture."""
        return self._model.family

    def allocate(self, capacity: int) -> NativeCache:
        """Return a buffer for ``capacity`` tokens; the system gives it memory as it fills."""
        rows, dim, blocks = self._model.num_key_rows, self._model.head_dim, -(-capacity // LANES)
        return NativeCache(
            torch.empty(rows, blocks, dim, LANES), torch.empty(rows, blocks * LANES, dim)
        )

    def copy(self, donor: NativeCache, target: NativeCache, length: int) -> None:
        """Copy the first ``length`` tokens' keys and values."""
        blocks = -(-length // LANES)
        target.keys[:, :blocks] = donor.keys[:, :blocks]
        target.values[:, :length] = donor.values[:, :length]

    def free(self, buffer: NativeCache) -> None:
        """Nothing to do: a buffer goes with its last reference."""

    def tokens(self, pieces: Sequence[Chunk[NativeCache]]) -> list[int]:
        """Run the pieces in one pass; return the greedy tokens of all outputs."""
        return self._run(pieces, None)

    def logits(self, pieces: Sequence[Chunk[NativeCache]]) -> Tensor:
        """Run the pieces in one pass; return the logits of all outputs, [outputs, head]."""
        count = sum(piece.num_outputs for piece in pieces)
        logits = torch.empty(count, self._model.num_outputs)
        self._run(pieces, logits)
        return logits

    def _run(self, pieces: Sequence[Chunk[NativeCache]], logits: Tensor | None) -> list[int]:
        ids = [token for piece in pieces for token in piece.tokens]
        if len(ids) > self._workspace.num_tokens:
            self._workspace = _Workspace(
                self._model, self._context_length, self._num_threads, len(ids)
            )
        work, model = self._workspace, self._model
        places, wanted = _places(pieces), _wanted(pieces)
        model.embed(ids, work.hidden)
        request = work.request
        request.tokens = places.ctypes.data
        request.wanted = wanted.ctypes.data
        request.logits = None if logits is None else logits.data_ptr()
        request.num_tokens, request.num_wanted = len(ids), len(wanted)
        model.functions.amusd_forward(self._team, byref(model.structure), byref(request))
        return self._sampler.merge(*work.maxima(len(wanted)))


def _places(pieces: Sequence[Chunk[NativeCache]]) -> Any:
    """Return where each token's keys and values go, as ``Token`` of ``native.h``."""
    rows = [
        (*piece.buffer.address, position)
        for piece in pieces
        for position in range(piece.start, piece.start + len(piece.tokens))
    ]
    return np.array(rows, dtype=np.int64)


def _wanted(pieces: Sequence[Chunk[NativeCache]]) -> Any:
    """Return the rows after which an answer is due."""
    ends = itertools.accumulate(len(piece.tokens) for piece in pieces)
    rows = [
        row
        for end, piece in zip(ends, pieces, strict=True)
        for row in range(end - piece.num_outputs, end)
    ]
    return np.array(rows, dtype=np.int64)


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
        self._best = np.zeros(num_threads * num_tokens, dtype=np.float32)
        self._ids = np.zeros(num_threads * num_tokens, dtype=np.int64)
        self._num_threads = num_threads
        self.request = Pass(
            scratch=self._scratch.data_ptr(),
            best=self._best.ctypes.data,
            ids=self._ids.ctypes.data,
            scratch_size=scratch_size,
            **{name: buffer.data_ptr() for name, buffer in self._buffers.items()},
        )

    @property
    def hidden(self) -> Tensor:
        """Where a pass takes embeddings from, [num_tokens, padded hidden]."""
        return self._buffers["hidden"]

    def maxima(self, num_outputs: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Return each thread's largest logits and their rows, ``[threads, outputs]`` each."""
        size, shape = self._num_threads * num_outputs, (self._num_threads, num_outputs)
        return self._best[:size].reshape(shape), self._ids[:size].reshape(shape)
