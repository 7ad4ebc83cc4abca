"""The native runner: one C call for the whole batch of a Llama-like model, float32 on CPU.

A token's result never depends on the rest of the batch, so this runner is exact. Threads share
the panels of the weights, and each output is summed by one thread.
"""

import ctypes
import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from amusd.engine.interface import MAX_ALTERNATIVES
from amusd.engine.native import library as native
from amusd.engine.native.library import LANES, Pass, padded
from amusd.engine.native.native_model import NativeModel
from amusd.engine.native.native_sampler import NativeSampler
from amusd.engine.runners.runner import Chunk, rows_of
from amusd.engine.sampling.reference_sampler import Sampled
from amusd.engine.sampling.sampler import Ranking, Sampler
from amusd.protocol.errors import InvalidInputError

_MAX_GROUP = 4  # query heads whose scores a thread holds at once
_CHUNK = struct.Struct("PPqqqq")  # the fields of the C structure; faster than ctypes attributes
_MIN_TOKENS = 16  # of a workspace

_Number = TypeVar("_Number", np.int64, np.float32)


@dataclass(slots=True)
class NativeCache:
    """Keys and values of one sequence.

    ``keys`` [layers * kv_heads, capacity / 16, head_dim, 16], ``values`` [layers * kv_heads,
    capacity, head_dim]. ``location`` is the address of each, and the capacity.
    """

    keys: Tensor
    values: Tensor
    location: tuple[int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        """Look up the addresses once, because each batch needs them."""
        self.location = self.keys.data_ptr(), self.values.data_ptr(), self.values.shape[1]


class NativeRunner:
    """Runs batches of a native model with ``num_threads`` threads."""

    name = "native"

    def __init__(
        self, model: NativeModel, sampler: Sampler, context_length: int, num_threads: int = 1
    ) -> None:
        """Run ``model`` over sequences of up to ``context_length`` tokens.

        ``num_threads`` includes the calling thread.
        """
        self._model = model
        self._sampler = sampler
        self._context_length = context_length
        self._num_threads = num_threads
        self._forward = model.functions.amusd_forward
        self._team = model.functions.amusd_team_open(num_threads)
        if not self._team:
            raise MemoryError(f"cannot start {num_threads} threads")
        weakref.finalize(self, model.functions.amusd_team_close, self._team)
        self._workspace = _Workspace(model, context_length, num_threads, _MIN_TOKENS)
        self._native_sampler: NativeSampler | None = None  # of the first batch that samples

    @property
    def context_length(self) -> int:
        """Most tokens of one sequence."""
        return self._context_length

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a forward pass reads."""
        return self._model.weight_bytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values."""
        return 2 * 4 * self._model.num_key_rows * self._model.head_dim

    @property
    def weight_format(self) -> str:
        """How the weights are stored."""
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
        """Copy the keys and values of the first ``length`` tokens."""
        blocks = -(-length // LANES)
        target.keys[:, :blocks] = donor.keys[:, :blocks]
        target.values[:, :length] = donor.values[:, :length]

    def free(self, buffer: NativeCache) -> None:
        """Do nothing: a buffer is freed with its last reference."""

    def tokens(self, batch: Sequence[Chunk[NativeCache]]) -> list[int]:
        """Run the batch; return the sampled tokens of all outputs."""
        self._run(batch, num_top=1)
        rows, largest = self._workspace.top()
        return self._sampler.pick(rows[:, 0], largest)

    def rankings(self, batch: Sequence[Chunk[NativeCache]]) -> list[Ranking]:
        """Run the batch; return the sampled and the next-best tokens of all outputs."""
        self._run(batch, num_top=1 + self._sampler.num_alternatives)
        work = self._workspace
        return self._sampler.rankings_of(*work.top(), work.probabilities())

    def sample(self, batch: Sequence[Chunk[NativeCache]]) -> list[Sampled]:
        """Run the batch; sample each output as the ``rows`` of its chunk say, in order.

        Without alternatives there are no probabilities.
        """
        sampler = self._native_sampler
        if sampler is None:
            sampler = self._native_sampler = NativeSampler(
                self._model.functions,
                self._model.num_outputs,
                self._model.vocabulary,
                self._sampler.host_head_ids,
                self._sampler.num_alternatives,
                self._num_threads,
            )
        address = sampler.prepare(rows_of(batch))
        self._run(batch, 1 + self._sampler.num_alternatives, sampling=address)
        return sampler.sampled()

    def logits(self, batch: Sequence[Chunk[NativeCache]]) -> Tensor:
        """Run the batch; return the logits of all outputs, [outputs, head]."""
        num_outputs = sum(chunk.num_outputs for chunk in batch)
        logits = torch.empty(num_outputs, self._model.num_outputs)
        self._run(batch, 1, logits)
        return logits

    def _run(
        self,
        batch: Sequence[Chunk[NativeCache]],
        num_top: int,
        logits: Tensor | None = None,
        sampling: int | None = None,
    ) -> None:
        """Run the batch, and find the ``num_top`` largest logits of each output.

        The workspace has the results until the next run. With ``sampling``, the address of a
        ``SamplingBatch``, this one has them.
        """
        num_tokens = sum([len(chunk.tokens) for chunk in batch])
        if num_tokens > self._workspace.max_tokens:
            size = 1 << (num_tokens - 1).bit_length()
            self._workspace = _Workspace(self._model, self._context_length, self._num_threads, size)
        work = self._workspace
        work.fill(batch)
        work.request.num_top = num_top
        work.request.logits = None if logits is None else logits.data_ptr()
        work.request.sampling = sampling
        if self._forward(self._team, self._model.address, work.address):
            raise InvalidInputError("a token id is outside the model's vocabulary")


class _Workspace:
    """The buffers of forward passes over up to ``max_tokens`` tokens, which C reads and writes."""

    def __init__(
        self, model: NativeModel, context_length: int, num_threads: int, max_tokens: int
    ) -> None:
        self.max_tokens = max_tokens
        widths = {
            "hidden": model.hidden,
            "normed": model.hidden,
            "qkv": (model.num_heads + 2 * model.num_kv_heads) * model.head_dim,
            "attended": model.num_heads * model.head_dim,
            "gate_up": 2 * model.intermediate,
            "mixed": model.intermediate,
        }
        widest = padded(max(widths["attended"], model.hidden, model.intermediate))
        scratch_size = max(padded(1) * (widest + max_tokens), _MAX_GROUP * (context_length + LANES))
        buffers = {name: torch.zeros(max_tokens, padded(width)) for name, width in widths.items()}
        buffers["scratch"] = torch.zeros(num_threads, scratch_size)
        self._chunks = (native.Chunk * max_tokens)()
        self._ids = (ctypes.c_int64 * max_tokens)()
        most_top = max_tokens * (1 + MAX_ALTERNATIVES)
        self._top_logits = np.zeros(num_threads * most_top, dtype=np.float32)
        self._top_rows = np.zeros(num_threads * most_top, dtype=np.int64)
        self._probabilities = np.zeros(most_top, dtype=np.float32)
        top_sums = np.zeros(num_threads * max_tokens, dtype=np.float32)
        tokens, output_rows = (native.Token * max_tokens)(), (ctypes.c_int64 * max_tokens)()
        self._referenced = (buffers, tokens, output_rows, top_sums)  # C has their addresses
        self.request = Pass(
            chunks=ctypes.addressof(self._chunks),
            ids=ctypes.addressof(self._ids),
            tokens=ctypes.addressof(tokens),
            output_rows=ctypes.addressof(output_rows),
            top_logits=self._top_logits.ctypes.data,
            top_rows=self._top_rows.ctypes.data,
            top_sums=top_sums.ctypes.data,
            probabilities=self._probabilities.ctypes.data,
            scratch_size=scratch_size,
            **{name: buffer.data_ptr() for name, buffer in buffers.items()},
        )
        self.address = ctypes.addressof(self.request)

    def fill(self, batch: Sequence[Chunk[NativeCache]]) -> None:
        """Write the batch to where C reads it."""
        offset = start = num_outputs = 0
        for chunk in batch:
            end = start + len(chunk.tokens)
            self._ids[start:end] = list(chunk.tokens)
            _CHUNK.pack_into(
                self._chunks,
                offset,
                *chunk.buffer.location,
                chunk.start,
                end - start,
                chunk.num_outputs,
            )
            offset += _CHUNK.size
            start = end
            num_outputs += chunk.num_outputs
        request = self.request
        request.num_chunks, request.num_tokens = len(batch), start
        request.num_outputs = num_outputs

    def top(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return the rows of the largest logits, [outputs, top], and the largest, [outputs]."""
        rows, logits = self._top(self._top_rows), self._top(self._top_logits)
        return rows, logits[:, 0]

    def probabilities(self) -> npt.NDArray[np.float32]:
        """Return the probabilities of the rows with the largest logits, [outputs, top]."""
        return self._top(self._probabilities)

    def _top(self, values: npt.NDArray[_Number]) -> npt.NDArray[_Number]:
        num_outputs, num_top = self.request.num_outputs, self.request.num_top
        return values[: num_outputs * num_top].reshape(num_outputs, num_top)
