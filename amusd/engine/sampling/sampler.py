"""The one place where logits become tokens, for every model runner.

PyTorch runners and captured graphs call ``sample`` or ``rank``. The native engine searches the
logits itself, so that a row of logits is never copied, and calls ``pick`` or ``rankings_of``. All
follow the same rule: the largest logit wins, and of equal ones the row that comes first. If a
logit is NaN, or the largest one is infinite, there is no token. Rows with sampling parameters go
through ``sample_rows``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from amusd.engine.interface import NO_TOKEN
from amusd.engine.sampling.reference_sampler import RowSampling, Sampled
from amusd.engine.sampling.torch_sampler import TorchSampler

_ONE = 1 << 30
"""Probability 1 beside token ids in one tensor of integers."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """The sampled token of an output and the next-best ones, with their probabilities.

    Both are [ranks], the likeliest token first. With ``NO_TOKEN`` there is no other token. Tokens
    of probability 0 are left out. Where logits are nearly equal, batches of other shapes may rank
    the next-best tokens otherwise.
    """

    tokens: tuple[int, ...]
    probabilities: tuple[float, ...]


class Sampler:
    """Greedy sampling over a full or a reduced output head."""

    def __init__(
        self,
        head_ids: Tensor | None = None,
        num_outputs: int | None = None,
        num_alternatives: int = 0,
    ) -> None:
        """Sample from the rows of an output head.

        Args:
            head_ids: the token id of each row of a reduced head, ``[head]`` int64, on the
                model's device. None: a row's number is its token id.
            num_outputs: only the first ``num_outputs`` rows are sampled. None: all rows.
            num_alternatives: next-best tokens that a ranking has beside the sampled one.
        """
        self.num_outputs = num_outputs
        self.num_alternatives = num_alternatives
        self._head_ids = head_ids
        self._host_head_ids = None if head_ids is None else head_ids.cpu().numpy()

    @property
    def host_head_ids(self) -> npt.NDArray[np.int64] | None:
        """The token id of each row of a reduced head, [head]; None: a full head."""
        return self._host_head_ids

    def sample(self, logits: Tensor) -> Tensor:
        """Return the tokens of ``logits`` [..., head] as [...] int64, on the same device.

        ``NO_TOKEN`` stands where the logits are not finite. Nothing is synchronised with the host,
        so a CUDA graph can capture the call.
        """
        return self._best(logits)[1]

    def sample_rows(self, logits: Tensor, rows: Sequence[RowSampling | None]) -> list[Sampled]:
        """Sample each output of ``logits`` [outputs, head] as its row says.

        None: the largest logit wins. The host waits for the device once.
        """
        return self._row_sampler.sample(logits, rows)

    @cached_property
    def _row_sampler(self) -> TorchSampler:
        return TorchSampler(self._head_ids, self.num_outputs, self.num_alternatives)

    def rank(self, logits: Tensor) -> Tensor:
        """Return the tokens of ``logits`` [..., head] and their ranking, [..., columns] int64.

        The first column is the token, as ``sample`` gives it. With alternatives, the tokens of the
        other ranks follow, and then the probabilities of all ranks in units of 2^-30; ``rankings``
        reads them. A CUDA graph can capture the call.
        """
        best, tokens = self._best(logits)
        if not self.num_alternatives:
            return tokens[..., None]
        allowed = logits[..., : self.num_outputs].float()
        others = allowed.scatter(-1, best, float("-inf"))
        most = min(self.num_alternatives, allowed.shape[-1] - 1)
        values, rows = others.topk(most, dim=-1)
        values = torch.cat([allowed.gather(-1, best), values], dim=-1)
        probabilities = (values - allowed.logsumexp(dim=-1, keepdim=True)).exp() * _ONE
        # What becomes of NaN in an integer is undefined.
        shares = probabilities.nan_to_num(0.0).round().to(torch.int64)
        rest = rows if self._head_ids is None else self._head_ids[rows]
        return torch.cat([tokens[..., None], rest, shares], dim=-1)

    def rankings(self, ranked: Tensor) -> list[Ranking]:
        """Return the ranking of each output from what ``rank`` returned, [outputs, columns]."""
        num_ranks = ranked.shape[-1] // 2
        host = ranked.cpu()
        tokens = host[:, :num_ranks].tolist()
        probabilities = (host[:, num_ranks:] / _ONE).tolist()
        return [_ranking(*one) for one in zip(tokens, probabilities, strict=True)]

    def pick(self, rows: npt.NDArray[np.int64], largest: npt.NDArray[np.float32]) -> list[int]:
        """Return the tokens of outputs whose largest logits are known.

        Args:
            rows: the head's row that has the largest logit, ``[outputs]``.
            largest: that logit, ``[outputs]``; NaN if any logit is.
        """
        found = rows if self._host_head_ids is None else self._host_head_ids[rows]
        is_finite = np.isfinite(largest)
        if not is_finite.all():
            found = np.where(is_finite, found, NO_TOKEN)
        tokens: list[int] = found.tolist()
        return tokens

    def rankings_of(
        self,
        rows: npt.NDArray[np.int64],
        largest: npt.NDArray[np.float32],
        probabilities: npt.NDArray[np.float32],
    ) -> list[Ranking]:
        """Return the rankings of outputs whose largest logits are known.

        Args:
            rows: the head's rows with the largest logits, the largest first, ``[outputs, ranks]``.
            largest: the largest logit, ``[outputs]``; NaN if any logit is.
            probabilities: of these rows, ``[outputs, ranks]``.
        """
        ids = (rows if self._host_head_ids is None else self._host_head_ids[rows]).tolist()
        for own, token in zip(ids, self.pick(rows[:, 0], largest), strict=True):
            own[0] = token
        return [_ranking(*one) for one in zip(ids, probabilities.tolist(), strict=True)]

    def _best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the row of the largest logit, [..., 1], and the token, [...]."""
        rows = logits[..., : self.num_outputs].argmax(dim=-1, keepdim=True)
        largest = logits.gather(-1, rows).squeeze(-1)  # NaN if there is any
        found = rows.squeeze(-1)
        tokens = found if self._head_ids is None else self._head_ids[found]
        return rows, tokens.masked_fill(~largest.isfinite(), NO_TOKEN)


def _ranking(tokens: list[int], probabilities: list[float]) -> Ranking:
    if tokens[0] == NO_TOKEN:
        return Ranking((NO_TOKEN,), (0.0,))
    num_ranks = len(tokens)
    while num_ranks > 1 and not probabilities[num_ranks - 1]:
        num_ranks -= 1
    return Ranking(tuple(tokens[:num_ranks]), tuple(probabilities[:num_ranks]))


GREEDY = Sampler()
"""For models whose head has a row for each token."""
