"""Sampling of one row of logits in NumPy: the reference, and the sampler of synthetic models.

The steps are those of ``Sampling`` in ``sampling.proto``. Edits and the choice of the token are the
same bits in every implementation. The sums of top-p may round differently in other ones, so a token
at the very border of top-p may be kept in one and left out in another.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from amusd.engine.interface import NO_TOKEN, NOTHING_ALLOWED
from amusd.engine.sampling.noise import gumbel_noise
from amusd.sampling.parameters import LogprobsOptions, SamplingParameters, TokenLogprobs

Logits = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """What changes the logits of one output, for the token at absolute ``position``.

    ``ids`` are distinct token ids [edits] int64. The repetition penalty divides or multiplies the
    logits where ``is_repeated`` [edits] bool. Then ``offsets`` [edits] float32 are added: bias less
    penalties, minus infinity for a banned token. ``allowed`` is a bitmask over token ids,
    [vocabulary / 32] uint32, lowest bit first; None allows all.
    """

    position: int
    ids: npt.NDArray[np.int64]
    is_repeated: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.float32]
    allowed: npt.NDArray[np.uint32] | None = None


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How the token of one output is chosen, and which log-probabilities are asked for.

    ``logprobs`` None: none. ``target`` is the token whose log-probability is asked for;
    ``NO_TOKEN`` stands for the sampled one.
    """

    parameters: SamplingParameters
    edits: LogitEdits
    logprobs: LogprobsOptions | None = None
    target: int = NO_TOKEN


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token of an output, the next-best ones, and their probabilities, [ranks] each.

    The first token is the sampled one, or ``NO_TOKEN`` or ``NOTHING_ALLOWED`` alone. With noise,
    the probabilities are the softmax of the noisy logits of these tokens alone: how far the first
    one is ahead. ``logprobs`` None: none are asked for, or there is no token.
    """

    tokens: tuple[int, ...]
    probabilities: tuple[float, ...]
    logprobs: TokenLogprobs | None = None


NOT_FINITE = Sampled((NO_TOKEN,), (0.0,))
"""Of logits that are NaN, or whose largest is infinite."""
ALL_BANNED = Sampled((NOTHING_ALLOWED,), (0.0,))
"""Of edits that leave no token."""


def edited(
    logits: Logits, edits: LogitEdits, parameters: SamplingParameters, row_of: dict[int, int] | None
) -> Logits:
    """Return the logits [head] after all edits.

    Args:
        logits: of the model, ``[head]``.
        edits: by token id; tokens without a row in the head are skipped.
        parameters: the repetition penalty.
        row_of: the head's row of each token id. None: the id itself.
    """
    found = logits.copy()
    rows = edits.ids
    keep = rows < len(found)
    if row_of is not None:
        rows = np.array([row_of.get(int(token), -1) for token in rows], dtype=np.int64)
        keep = rows >= 0
    rows, repeated, offsets = rows[keep], edits.is_repeated[keep], edits.offsets[keep]
    values = found[rows]
    penalty = np.float32(parameters.repetition_penalty)
    penalized = np.where(values > 0, values / penalty, values * penalty)
    found[rows] = np.where(repeated, penalized, values) + offsets
    if edits.allowed is not None:
        bits = np.unpackbits(edits.allowed.view(np.uint8), bitorder="little").astype(bool)
        ids = np.arange(len(found)) if row_of is None else np.array(list(row_of))
        at = ids if row_of is None else np.array(list(row_of.values()))
        is_allowed = np.zeros(len(found), dtype=bool)
        is_allowed[at] = bits[ids]
        found[~is_allowed] = -np.inf
    return found


def kept_scores(logits: Logits, parameters: SamplingParameters) -> Scores:
    """Return ``logits / temperature`` [head], minus infinity where a filter leaves a token out.

    Greedy decoding has no temperature and no filters.
    """
    if parameters.is_greedy:
        return logits.astype(np.float64)
    scores = logits.astype(np.float64) / parameters.temperature
    if 0 < parameters.top_k < len(scores):
        border = np.partition(scores, -parameters.top_k)[-parameters.top_k]
        scores[scores < border] = -np.inf
    largest = scores.max()
    if parameters.top_p < 1.0:
        order = np.argsort(-scores, kind="stable")
        shares = np.exp(scores[order] - largest)
        sums = np.cumsum(shares)
        num_kept = int(np.searchsorted(sums, parameters.top_p * sums[-1])) + 1
        scores[order[num_kept:]] = -np.inf
    if parameters.min_p > 0.0:
        scores[scores < largest + math.log(parameters.min_p)] = -np.inf
    return scores


def sample(
    logits: Logits,
    edits: LogitEdits,
    parameters: SamplingParameters,
    head_ids: npt.NDArray[np.int64] | None = None,
    num_alternatives: int = 0,
) -> Sampled:
    """Return the token of one output of a model, and the next-best ones.

    Args:
        logits: of the model, ``[head]``.
        edits: by token id.
        parameters: how the token is chosen.
        head_ids: the token id of each row of a reduced head, ``[head]``. None: the row itself.
        num_alternatives: next-best tokens to return, as far as they are possible.
    """
    if not np.isfinite(logits.max()):  # NaN if there is any
        return NOT_FINITE
    row_of = None if head_ids is None else {int(one): row for row, one in enumerate(head_ids)}
    processed = edited(logits, edits, parameters, row_of)
    ids = np.arange(len(logits)) if head_ids is None else head_ids
    if not (processed > -np.inf).any():
        return ALL_BANNED
    scores = kept_scores(processed, parameters)
    if not parameters.is_greedy:
        scores = scores + gumbel_noise(parameters.seed, edits.position, ids)
    best = np.argsort(-scores, kind="stable")[: 1 + num_alternatives]
    best = best[scores[best] > -np.inf]
    among = scores if parameters.is_greedy else scores[best]
    shares = np.exp(scores[best] - scores[best[0]]) / np.exp(among - among.max()).sum()
    return Sampled(tuple(int(ids[row]) for row in best), tuple(float(one) for one in shares))


def sample_row(
    logits: Logits,
    row: RowSampling,
    head_ids: npt.NDArray[np.int64] | None = None,
    num_alternatives: int = 0,
) -> Sampled:
    """Return what ``sample`` does, with the log-probabilities that the row asks for."""
    found = sample(logits, row.edits, row.parameters, head_ids, num_alternatives)
    if row.logprobs is None or found in (NOT_FINITE, ALL_BANNED):
        return found
    scores = logits.astype(np.float64)
    if row.logprobs.is_processed:
        row_of = None if head_ids is None else {int(one): at for at, one in enumerate(head_ids)}
        scores = kept_scores(edited(logits, row.edits, row.parameters, row_of), row.parameters)
    target = found.tokens[0] if row.target == NO_TOKEN else row.target
    return replace(found, logprobs=logprobs_of(scores, target, row.logprobs.num_top, head_ids))


def logprobs_of(
    scores: Scores, token: int, num_top: int, head_ids: npt.NDArray[np.int64] | None = None
) -> TokenLogprobs:
    """Return the log-probability of a token under scores [head], and those of the likeliest.

    Impossible tokens are never among the likeliest.
    """
    ids = np.arange(len(scores)) if head_ids is None else head_ids
    largest = scores.max()
    total = largest + math.log(float(np.exp(scores - largest).sum()))
    best = np.argsort(-scores, kind="stable")[:num_top]
    best = best[scores[best] > -np.inf]
    rows = np.flatnonzero(ids == token)
    own = float(scores[rows[0]] - total) if len(rows) else -math.inf
    top = tuple((int(ids[row]), float(scores[row] - total)) for row in best)
    return TokenLogprobs(token, own, top)
