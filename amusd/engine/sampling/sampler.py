"""The one place where logits become tokens, for every model runner.

PyTorch runners and captured graphs call ``sample``. The native engine finds the largest logit of
each thread's part itself, so that a row of logits is never copied, and calls ``merge``. Both
follow the same rule: the largest logit wins, and of equal ones the row that comes first. If a
logit is NaN, or the largest one is infinite, there is no token.
"""

import numpy as np
import numpy.typing as npt
from torch import Tensor

from amusd.engine.interface import NO_TOKEN


class Sampler:
    """Greedy sampling over a full or a reduced output head."""

    def __init__(self, head_ids: Tensor | None = None, num_outputs: int | None = None) -> None:
        """Sample from the rows of an output head.

        Args:
            head_ids: the token id of each row of a reduced head, ``[head]`` int64, on the
                model's device. None: a row's number is its token id.
            num_outputs: only the first ``num_outputs`` rows are sampled. None: all rows.
        """
        self.num_outputs = num_outputs
        self._head_ids = head_ids
        self._host_head_ids = None if head_ids is None else head_ids.cpu().numpy()

    def sample(self, logits: Tensor) -> Tensor:
        """Return the tokens of ``logits`` [..., head] as [...] int64, on the same device.

        ``NO_TOKEN`` stands where the logits are not finite. Nothing is synchronised with the host,
        so a CUDA graph can capture the call.
        """
        rows = logits[..., : self.num_outputs].argmax(dim=-1, keepdim=True)
        largest = logits.gather(-1, rows).squeeze(-1)  # NaN if there is any
        rows = rows.squeeze(-1)
        tokens = rows if self._head_ids is None else self._head_ids[rows]
        return tokens.masked_fill(~largest.isfinite(), NO_TOKEN)

    def merge(self, maxima: npt.NDArray[np.float32], rows: npt.NDArray[np.int64]) -> list[int]:
        """Return the tokens of outputs whose logits were searched in parts, in ascending order.

        Args:
            maxima: the largest logit of each part, ``[parts, outputs]``; NaN if it has any.
            rows: the head's row that has it, ``[parts, outputs]``.
        """
        found, largest = rows[0], maxima[0]
        if len(rows) > 1:
            best = maxima.argmax(axis=0), np.arange(rows.shape[1])  # NaN is the largest
            found, largest = rows[best], maxima[best]
        if self._host_head_ids is not None:
            found = self._host_head_ids[found]
        is_finite = np.isfinite(largest)
        if not is_finite.all():
            found = np.where(is_finite, found, NO_TOKEN)
        tokens: list[int] = found.tolist()
        return tokens


GREEDY = Sampler()
"""For models whose head has a row for each token."""
