"""Sampling of rows of logits in PyTorch, on the device of the logits; as ``reference_sampler``.

All rows of a batch are sampled together, in groups that bound the memory. The host waits once, for
what all groups found. The noise of all tokens is computed with the library's logarithm first; the
tokens with the largest scores are then compared by the exact noise. If more tokens are so close
that one may have been missed, the reference samples that row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from amusd.engine.interface import NO_TOKEN
from amusd.engine.sampling.reference_sampler import (
    ALL_BANNED,
    NOT_FINITE,
    LogitEdits,
    RowSampling,
    Sampled,
    sample_row,
)
from amusd.engine.sampling.torch_noise import gumbel_of, nearly_gumbel_of, philox
from amusd.sampling.parameters import SamplingParameters, TokenLogprobs

_GROUP_SIZE = 1 << 22  # logits of a group; each takes about 100 bytes for a moment
_CPU_GROUP_SIZE = 1 << 18  # so that they stay in the cache of the processor
_NUM_CANDIDATES = 32
_MARGIN = 1e-9  # more than the error of scores that are computed in two ways
_NO_IDS = np.empty(0, dtype=np.int64)
_PLAIN = RowSampling(
    SamplingParameters(),
    LogitEdits(0, _NO_IDS, np.empty(0, dtype=np.bool_), np.empty(0, dtype=np.float32)),
)


class TorchSampler:
    """Samples the outputs of one model, of a full or a reduced output head."""

    def __init__(self, head_ids: Tensor | None, num_outputs: int | None, num_alternatives: int):
        """Sample as ``Sampler`` with the same arguments."""
        self._head_ids = None if head_ids is None else head_ids[:num_outputs]
        self._num_outputs = num_outputs
        self._num_ranks = 1 + num_alternatives
        self._ids: npt.NDArray[np.int64] | None = None
        if self._head_ids is not None:
            self._ids = self._head_ids.cpu().numpy()
            self._row_of = np.full(int(self._ids.max()) + 1, -1)  # by token id; -1: no row
            self._row_of[self._ids] = np.arange(len(self._ids))
            blocks, blocks_of = np.unique(self._ids >> 2, return_inverse=True)
            self._blocks = torch.from_numpy(blocks).to(self._head_ids.device)
            places = torch.from_numpy(blocks_of * 4 + (self._ids & 3))
            self._places = places.to(self._head_ids.device)

    def sample(self, logits: Tensor, rows: Sequence[RowSampling | None]) -> list[Sampled]:
        """Sample each of ``logits`` [outputs, head] as its row says; None: the largest wins."""
        if not rows:
            return []
        logits = logits[:, : self._num_outputs]
        chosen = [row or _PLAIN for row in rows]
        num_ranks = min(self._num_ranks, logits.shape[1])
        most = _CPU_GROUP_SIZE if logits.device.type == "cpu" else _GROUP_SIZE
        size = max(1, most // logits.shape[1])
        starts = range(0, len(chosen), size)
        groups = [_Group(self, logits[at : at + size], chosen[at : at + size]) for at in starts]
        found = torch.cat([group.run(_most_top(chosen)) for group in groups])
        return [
            self._reference(logits[at], row)
            if line[_IS_CLOSE]
            else self._sampled(row, line, num_ranks)
            for at, (row, line) in enumerate(zip(chosen, found.cpu().numpy(), strict=True))
        ]

    def ids(self, device: torch.device, size: int) -> Tensor:
        """Return the token id of each row of the head, [head] int64."""
        if self._head_ids is None:
            return torch.arange(size, device=device)
        return self._head_ids.to(device)

    def rows_of(self, ids: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
        """Return the head's row of each token id, -1 where it has none."""
        if self._ids is None:
            return np.where((ids >= 0) & (ids < size), ids, -1)
        known = (ids >= 0) & (ids < len(self._row_of))
        return np.where(known, self._row_of[np.where(known, ids, 0)], -1)

    def random_bits(self, size: int, positions: Tensor, seeds: tuple[Tensor, Tensor]) -> Tensor:
        """Return the random number of each token of the head, [rows, head] int64."""
        if self._head_ids is None:
            blocks = torch.arange(-(-size // 4), device=positions.device)
            return torch.stack(philox(blocks, positions, seeds), dim=-1).flatten(1)[:, :size]
        words = torch.stack(philox(self._blocks, positions, seeds), dim=-1)
        return words.flatten(1)[:, self._places]

    @property
    def num_ranks(self) -> int:
        """Tokens of an output: the sampled one and the next-best ones."""
        return self._num_ranks

    def _reference(self, logits: Tensor, row: RowSampling) -> Sampled:
        values = logits.float().cpu().numpy()
        return sample_row(values, row, self._ids, self._num_ranks - 1)

    def _sampled(self, row: RowSampling, line: npt.NDArray[np.float64], ranks: int) -> Sampled:
        """Read what ``_Group.run`` found for a row."""
        if not line[_IS_FINITE]:
            return NOT_FINITE
        rows, scores = line[_HEADER:][:ranks], line[_HEADER + ranks :][:ranks]
        if scores[0] == -np.inf:
            return ALL_BANNED
        keep = scores > -np.inf
        shares = np.exp(scores[keep] - scores[0])
        total = math.exp(line[_TOTAL] - scores[0]) if row.parameters.is_greedy else shares.sum()
        tokens = tuple(self._id(one) for one in rows[keep])
        probabilities = tuple(float(one) for one in shares / total)
        logprobs = self._logprobs(row, tokens[0], line[_HEADER + 2 * ranks :])
        return Sampled(tokens, probabilities, logprobs)

    def _logprobs(
        self, row: RowSampling, token: int, line: npt.NDArray[np.float64]
    ) -> TokenLogprobs | None:
        if row.logprobs is None:
            return None
        most, num_top = len(line) // 2, row.logprobs.num_top
        pairs = zip(line[1 : 1 + most][:num_top], line[1 + most :][:num_top], strict=True)
        top = tuple((self._id(one), float(value)) for one, value in pairs if value > -np.inf)
        return TokenLogprobs(token if row.target == NO_TOKEN else row.target, float(line[0]), top)

    def _id(self, row: float) -> int:
        return int(row) if self._ids is None else int(self._ids[int(row)])


_IS_FINITE, _IS_CLOSE, _TOTAL, _HEADER = 0, 1, 2, 3
"""The first columns of what a group returns."""


@dataclass(frozen=True)
class _Group:
    """Rows that are sampled together, and their logits [rows, head]."""

    sampler: TorchSampler
    logits: Tensor
    rows: Sequence[RowSampling]

    def run(self, most_top: int | None) -> Tensor:
        """Return a line of float64 for each row: the header, ranks, and log-probabilities.

        Ranks are the head's rows of the sampled and the next-best tokens, then their scores. With
        ``most_top``, the log-probability of the target follows, then rows and log-probabilities of
        the ``most_top`` likeliest tokens.
        """
        logits = self.logits.float()
        is_finite = logits.amax(dim=-1).isfinite()  # the largest is NaN if any is
        kept = self._kept(self._edited(logits))
        ranks, scores, is_close = self._best(kept)
        total = kept.logsumexp(dim=-1)
        parts = [is_finite[:, None], (is_close & is_finite)[:, None], total[:, None], ranks, scores]
        if most_top is not None:
            parts.append(self._logprobs(logits, kept, ranks[:, :1], most_top))
        return torch.cat([part.double() for part in parts], dim=-1)

    def _edited(self, logits: Tensor) -> Tensor:
        """Return the logits after all edits, [rows, head] float32."""
        num_rows, size = logits.shape
        found = logits.clone()
        edits = [row.edits for row in self.rows]
        lengths = [len(one.ids) for one in edits]
        if any(lengths):
            columns = self.sampler.rows_of(np.concatenate([one.ids for one in edits]), size)
            keep = columns >= 0
            flat = (np.repeat(np.arange(num_rows), lengths) * size + columns)[keep]
            penalties = [row.parameters.repetition_penalty for row in self.rows]
            at = self._tensor(flat)
            values = found.view(-1)[at]
            penalty = self._tensor(np.repeat(np.array(penalties, np.float32), lengths)[keep])
            is_repeated = self._tensor(np.concatenate([one.is_repeated for one in edits])[keep])
            offsets = self._tensor(np.concatenate([one.offsets for one in edits])[keep])
            penalized = torch.where(values > 0, values / penalty, values * penalty)
            found.view(-1)[at] = torch.where(is_repeated, penalized, values) + offsets
        masks = {at: one.allowed for at, one in enumerate(edits) if one.allowed is not None}
        if masks:
            ids = self.sampler.ids(logits.device, size)
            words = self._tensor(np.stack(list(masks.values())).view(np.int32))
            bits = (words[:, ids >> 5] >> (ids & 31)) & 1
            at = self._tensor(np.array(list(masks)))
            found[at] = found[at].masked_fill(bits == 0, -math.inf)
        return found

    def _kept(self, processed: Tensor) -> Tensor:
        """Return ``logits / temperature`` [rows, head] float64, without what filters leave out."""
        each = [row.parameters for row in self.rows]
        scores = processed.double() / self._column([one.temperature or 1.0 for one in each])
        largest = scores.amax(dim=-1, keepdim=True)
        noisy = [(at, one) for at, one in enumerate(each) if not one.is_greedy]
        size = scores.shape[1]
        if found := [(at, one.top_k) for at, one in noisy if 0 < one.top_k < size]:
            at, top_k = self._pairs(found)
            own = scores[at]
            border = own.topk(max(k for _, k in found)).values.gather(1, top_k - 1)
            scores[at] = own.masked_fill(own < border, -math.inf)
        if chosen := [(at, one.top_p) for at, one in noisy if one.top_p < 1.0]:
            at = self._tensor(np.array([index for index, _ in chosen]))
            own, order = scores[at].sort(dim=-1, descending=True, stable=True)
            sums = (own - own[:, :1]).exp().cumsum(dim=-1)
            is_out = sums >= self._column([share for _, share in chosen]) * sums[:, -1:]
            own[:, 1:] = own[:, 1:].masked_fill(is_out[:, :-1], -math.inf)
            scores[at] = torch.empty_like(own).scatter_(1, order, own)
        if chosen := [(at, one.min_p) for at, one in noisy if one.min_p > 0.0]:
            at = self._tensor(np.array([index for index, _ in chosen]))
            border = largest[at] + self._column([math.log(share) for _, share in chosen])
            scores[at] = scores[at].masked_fill(scores[at] < border, -math.inf)
        return scores

    def _best(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best rows of the head and their scores, both [rows, ranks], best first.

        The third result says of which rows a token may have been missed, [rows] bool.
        """
        size = kept.shape[1]
        num_ranks = min(self.sampler.num_ranks, size)
        most = min(_NUM_CANDIDATES, size)
        noisy = [at for at, row in enumerate(self.rows) if not row.parameters.is_greedy]
        at, nearly = self._tensor(np.array(noisy, dtype=np.int64)), kept
        if noisy:
            nearly = kept.index_add(
                0, at, nearly_gumbel_of(self.sampler.random_bits(size, *self._counters(noisy)))
            )
        nearest = nearly.topk(most, dim=-1)
        candidates = nearest.indices.sort(dim=-1).values  # of equal ones the first is ahead
        scores = kept.gather(1, candidates)
        if noisy:
            ids = self.sampler.ids(kept.device, size)[candidates[at]]
            scores = scores.index_add(0, at, gumbel_of(self._bits_of(noisy, ids)))
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
        ranks, scores = candidates.gather(1, order)[:, :num_ranks], scores[:, :num_ranks]
        if most == size:
            return ranks, scores, torch.zeros_like(scores[:, 0], dtype=torch.bool)
        least = nearest.values[:, -1]
        return ranks, scores, (scores[:, -1] <= least + _MARGIN) & (least > -math.inf)

    def _logprobs(self, logits: Tensor, kept: Tensor, first: Tensor, most_top: int) -> Tensor:
        """Return the log-probabilities of targets and likeliest tokens; see ``run``."""
        options = [row.logprobs for row in self.rows]
        is_processed = self._column([one is not None and one.is_processed for one in options])
        scores = torch.where(is_processed, kept, logits.double())
        scores = scores - scores.logsumexp(dim=-1, keepdim=True)
        size = scores.shape[1]
        wanted = np.array([row.target for row in self.rows], dtype=np.int64)
        targets = self._tensor(np.where(wanted == NO_TOKEN, -2, self.sampler.rows_of(wanted, size)))
        targets = torch.where(targets[:, None] == -2, first, targets[:, None])
        own = scores.gather(1, targets.clamp(min=0)).masked_fill(targets < 0, -math.inf)
        top = scores.topk(min(most_top, size), dim=-1)
        return torch.cat([own, top.indices.double(), top.values], dim=-1)

    def _bits_of(self, at: Sequence[int], ids: Tensor) -> Tensor:
        """Return the random number of each of ``ids`` [rows, n], [rows, n] int64."""
        words = torch.stack(philox(ids >> 2, *self._counters(at)), dim=-1)
        return words.gather(-1, (ids & 3)[..., None])[..., 0]

    def _counters(self, at: Sequence[int]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return positions and both halves of the seeds, [rows, 1] int64 each."""
        rows = [self.rows[index] for index in at]
        positions = self._column([row.edits.position for row in rows])
        seeds = [row.parameters.seed for row in rows]
        low = self._column([seed & 0xFFFFFFFF for seed in seeds])
        return positions, (low, self._column([seed >> 32 for seed in seeds]))

    def _pairs(self, found: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        pairs = self._tensor(np.array(found, dtype=np.int64))
        return pairs[:, 0], pairs[:, 1:]

    def _column(self, values: Sequence[float]) -> Tensor:
        """Return one number or bool a row, [rows, 1]; ints as int64, floats as float64."""
        return self._tensor(np.array(values)[:, None])

    def _tensor(self, values: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values).to(self.logits.device, non_blocking=True)


def _most_top(rows: Sequence[RowSampling]) -> int | None:
    """Return the most likeliest tokens that a row asks for; None: no row asks for any."""
    numbers = [row.logprobs.num_top for row in rows if row.logprobs is not None]
    return max(numbers, default=None)
