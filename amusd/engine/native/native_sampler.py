"""Samples rows of logits in C: packs how each token is chosen, and reads what C has chosen.

A token is the one of ``reference_sampler``. Logits stay where they are; only tokens and
log-probabilities cross the border.
"""

import ctypes
import math
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from amusd.engine.interface import NO_TOKEN, NOTHING_ALLOWED
from amusd.engine.native.library import PLAIN, STORED, STREAMED, Sampling, SamplingBatch
from amusd.engine.sampling.reference_sampler import (
    ALL_BANNED,
    NOT_FINITE,
    LogitEdits,
    RowSampling,
    Sampled,
)
from amusd.sampling.parameters import MAX_LOGPROBS, TokenLogprobs

GROUP = 32
"""Outputs that are sampled at once: as many rows of logits are kept."""

_ROW = struct.Struct("dddQPPPPqqqqqqfiii")  # the C structure; faster than ctypes attributes
_PLAIN_ROW = _ROW.pack(*[0] * 12, -1, NO_TOKEN, 0, 0, PLAIN, 0)


class NativeSampler:
    """Samples with the native engine over a full or a reduced output head.

    It belongs to one thread at a time.
    """

    def __init__(
        self,
        functions: Any,
        head: int,
        vocabulary: int,
        head_ids: npt.NDArray[np.int64] | None = None,
        num_alternatives: int = 0,
        num_threads: int = 1,
    ) -> None:
        """Sample rows of logits of width ``head``.

        Args:
            functions: of the native library.
            head: logits of a row.
            vocabulary: token ids are below it.
            head_ids: the token id of each row of a reduced head, ``[head]``. None: the row itself.
            num_alternatives: next-best tokens of each output.
            num_threads: of the team that runs passes.
        """
        self._functions = functions
        self._num_top = 1 + num_alternatives
        self._head_ids = None if head_ids is None else np.ascontiguousarray(head_ids[:head])
        self._head_rows = _rows_of(self._head_ids, vocabulary)
        scratch_size = int(functions.amusd_sampling_scratch(head, GROUP))
        self._scratch = np.empty(num_threads * scratch_size, dtype=np.uint8)
        self._logits = np.empty((0, head), dtype=np.float32)
        self._edits = _Edits()
        self._with_logprobs: list[int] = []
        self._num_rows = self._capacity = 0
        self.request = SamplingBatch(
            head_ids=_address(self._head_ids),
            head_rows=_address(self._head_rows),
            scratch=self._scratch.ctypes.data,
            num_ids=head if head_ids is None else vocabulary,
            head=head,
            num_top=self._num_top,
            group=GROUP,
            scratch_size=scratch_size,
        )
        self.address = ctypes.addressof(self.request)
        self._grow(GROUP)

    def prepare(self, rows: Sequence[RowSampling | None]) -> int:
        """Write how the tokens of a pass are chosen; return the address of the C structure.

        None stands for greedy decoding without anything else.

        Raises:
            ValueError: the ids, flags and offsets of a row's edits differ in length.
        """
        self._write(rows)
        if len(self._logits) < min(len(rows), GROUP):
            self._logits = np.empty(
                (min(len(rows), GROUP), self._logits.shape[1]), dtype=np.float32
            )
        self.request.logits = self._logits.ctypes.data
        return self.address

    def sample(self, logits: npt.NDArray[np.float32], rows: Sequence[RowSampling]) -> list[Sampled]:
        """Return the tokens for given logits, ``[rows, head]``, contiguous.

        Raises:
            ValueError: the shape of the logits is another one, or that of edits.
        """
        if logits.shape != (len(rows), self._logits.shape[1]) or not logits.flags.c_contiguous:
            raise ValueError(f"logits of shape {logits.shape} for {len(rows)} rows")
        self._write(rows)
        self.request.logits = logits.ctypes.data
        self._functions.amusd_sample(self.address, len(rows))
        return self.sampled()

    def sampled(self) -> list[Sampled]:
        """Return the tokens of the last pass, with the log-probabilities that are asked for.

        ``NO_TOKEN`` stands where logits are not finite, ``NOTHING_ALLOWED`` where every token is
        banned. Without alternatives there are no probabilities. Impossible tokens are never among
        the likeliest ones.
        """
        num_top = self._num_top
        tokens = self._tokens[: self._num_rows * num_top].tolist()
        shares = self._probabilities[: len(tokens)].tolist() if num_top > 1 else []
        found = [
            _sampled(tokens[start : start + num_top], shares[start : start + num_top])
            for start in range(0, len(tokens), num_top)
        ]
        for index in self._with_logprobs:
            if found[index].tokens[0] >= 0:
                found[index] = replace(found[index], logprobs=self._logprobs_of(index))
        return found

    def _logprobs_of(self, index: int) -> TokenLogprobs:
        start = index * (1 + MAX_LOGPROBS)
        token, *others = self._logprob_tokens[start : start + 1 + MAX_LOGPROBS].tolist()
        own, *values = self._logprobs[start : start + 1 + MAX_LOGPROBS].tolist()
        return TokenLogprobs(token, own, tuple(zip(others[: _count(others)], values, strict=False)))

    def _write(self, rows: Sequence[RowSampling | None]) -> None:
        if len(rows) > self._capacity:
            self._grow(1 << (len(rows) - 1).bit_length())
        self._num_rows = len(rows)
        self._edits.reserve(rows)
        self._with_logprobs = [
            index for index, row in enumerate(rows) if row is not None and row.logprobs is not None
        ]
        offset = 0
        for row in rows:
            if row is None:
                self._packed[offset : offset + _ROW.size] = _PLAIN_ROW
            else:
                self._pack(row, offset)
            offset += _ROW.size

    def _pack(self, row: RowSampling, offset: int) -> None:
        parameters, edits, logprobs = row.parameters, row.edits, row.logprobs
        num_edits, num_words = len(edits.ids), 0 if edits.allowed is None else len(edits.allowed)
        min_p = parameters.min_p
        _ROW.pack_into(
            self._packed,
            offset,
            parameters.temperature,
            parameters.top_p,
            math.log(min_p) if min_p > 0.0 else -math.inf,
            parameters.seed,
            *(self._edits.add(edits) if num_edits else (0, 0, 0)),
            0 if edits.allowed is None else self._edits.add_mask(edits.allowed),
            edits.position,
            parameters.top_k,
            num_edits,
            num_words,
            -1 if logprobs is None else logprobs.num_top,
            row.target,
            parameters.repetition_penalty,
            logprobs is not None and logprobs.is_processed,
            _kind(row),
            0,
        )

    def _grow(self, capacity: int) -> None:
        self._capacity = capacity
        self._rows = (Sampling * capacity)()
        self._packed = memoryview(self._rows).cast("B")
        self._tokens = np.empty(capacity * self._num_top, dtype=np.int64)
        self._probabilities = np.empty(capacity * self._num_top, dtype=np.float32)
        self._logprob_tokens = np.empty(capacity * (1 + MAX_LOGPROBS), dtype=np.int64)
        self._logprobs = np.empty(capacity * (1 + MAX_LOGPROBS), dtype=np.float64)
        self.request.rows = ctypes.addressof(self._rows)
        self.request.tokens = self._tokens.ctypes.data
        self.request.probabilities = self._probabilities.ctypes.data
        self.request.logprob_tokens = self._logprob_tokens.ctypes.data
        self.request.logprobs = self._logprobs.ctypes.data


class _Edits:
    """The edits of all rows of a batch in buffers that C reads.

    To copy them takes less time than to ask NumPy for the address of each array.
    """

    def __init__(self) -> None:
        self._reserve_edits(64)
        self._reserve_words(0)

    def reserve(self, rows: Sequence[RowSampling | None]) -> None:
        """Drop the edits of the last batch, and make room for those of ``rows``."""
        edits = [row.edits for row in rows if row is not None]
        num_edits = sum([len(one.ids) for one in edits])
        num_words = sum([len(one.allowed) for one in edits if one.allowed is not None])
        if num_edits > len(self._ids):
            self._reserve_edits(1 << num_edits.bit_length())
        if num_words > len(self._words):
            self._reserve_words(1 << num_words.bit_length())
        self._num_edits = self._num_words = 0

    def add(self, edits: LogitEdits) -> tuple[int, int, int]:
        """Copy the edits of a row; return the addresses of ids, flags and offsets.

        Raises:
            ValueError: they differ in length.
        """
        start = self._num_edits
        end = self._num_edits = start + len(edits.ids)
        self._ids[start:end] = edits.ids
        self._is_repeated[start:end] = edits.is_repeated
        self._offsets[start:end] = edits.offsets
        ids, is_repeated, offsets = self._addresses
        return ids + 8 * start, is_repeated + start, offsets + 4 * start

    def add_mask(self, allowed: npt.NDArray[np.uint32]) -> int:
        """Copy the bitmask of a row; return its address."""
        start = self._num_words
        self._num_words = start + len(allowed)
        self._words[start : self._num_words] = allowed
        return self._words_address + 4 * start

    def _reserve_edits(self, size: int) -> None:
        self._ids = np.empty(size, dtype=np.int64)
        self._is_repeated = np.empty(size, dtype=np.bool_)
        self._offsets = np.empty(size, dtype=np.float32)
        arrays: tuple[npt.NDArray[Any], ...] = (self._ids, self._is_repeated, self._offsets)
        self._addresses = tuple(array.ctypes.data for array in arrays)

    def _reserve_words(self, size: int) -> None:
        self._words = np.empty(size, dtype=np.uint32)
        self._words_address = self._words.ctypes.data


def _kind(row: RowSampling) -> int:
    """Return whether the C code needs all logits of a row at once."""
    if len(row.edits.ids) or row.edits.allowed is not None or row.logprobs is not None:
        return STORED
    if row.parameters.is_greedy:
        return PLAIN
    return STORED if row.parameters.has_filters else STREAMED


def _sampled(tokens: list[int], shares: list[float]) -> Sampled:
    if tokens[0] < 0:
        return ALL_BANNED if tokens[0] == NOTHING_ALLOWED else NOT_FINITE
    count = _count(tokens)
    return Sampled(tuple(tokens[:count]), tuple(shares[:count]))


def _count(tokens: list[int]) -> int:
    """Return how many tokens there are before ``NO_TOKEN``."""
    return tokens.index(NO_TOKEN) if NO_TOKEN in tokens else len(tokens)


def _rows_of(
    head_ids: npt.NDArray[np.int64] | None, vocabulary: int
) -> npt.NDArray[np.int32] | None:
    """Return the row of each token id in a reduced head, [vocabulary]; -1: none."""
    if head_ids is None:
        return None
    rows = np.full(vocabulary, -1, dtype=np.int32)
    rows[head_ids] = np.arange(len(head_ids), dtype=np.int32)
    return rows


def _address(array: npt.NDArray[Any] | None) -> int | None:
    return None if array is None else array.ctypes.data
