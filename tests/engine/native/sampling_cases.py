"""Random rows of logits and ways to sample them, for comparing samplers."""

import math

import numpy as np
import numpy.typing as npt

from amusd.engine.interface import NO_TOKEN
from amusd.engine.sampling.reference_sampler import LogitEdits, RowSampling
from amusd.sampling.parameters import LogprobsOptions, SamplingParameters

_TEMPERATURES = (0.0, 0.01, 0.3, 1.0, 1.5, 10.0, 100.0)
_TOP_PS = (1.0, 1.0, 1e-6, 0.1, 0.5, 0.95, 0.999, 1 - 1e-7)


def random_logits(rng: np.random.Generator, width: int) -> npt.NDArray[np.float32]:
    """Return logits [width]: spread, equal, nearly equal, with ties, tiny, huge or not finite."""
    kinds = (
        rng.normal(0, 3, width),
        np.zeros(width),
        rng.normal(0, 1e-3, width),
        rng.integers(-3, 3, width).astype(np.float64),
        rng.normal(0, 1, width) * 10.0 ** rng.integers(-6, 6),
        rng.integers(-100, 100) - rng.exponential(2, width),
    )
    logits = kinds[rng.integers(len(kinds))].astype(np.float32)
    if rng.random() < 0.1:
        logits[rng.integers(width)] = -math.inf
    if rng.random() < 0.03:
        logits[rng.integers(width)] = rng.choice([math.nan, math.inf])
    return logits


def random_row(rng: np.random.Generator, width: int, vocabulary: int) -> RowSampling:
    """Return a way to sample: any temperature, filters, edits, bitmask and log-probabilities."""
    parameters = SamplingParameters(
        temperature=float(rng.choice(_TEMPERATURES)),
        top_k=int(rng.choice([0, 0, 1, 2, 40, width - 1, width, width + 5])),
        top_p=float(rng.choice(_TOP_PS)),
        min_p=float(rng.choice([0.0, 0.0, 1e-30, 0.05, 1.0])),
        repetition_penalty=float(rng.choice([0.5, 1.0, 1.1, 100.0])),
        seed=int(rng.integers(1 << 64, dtype=np.uint64)),
    )
    logprobs = None
    if rng.random() < 0.4:
        logprobs = LogprobsOptions(int(rng.integers(21)), bool(rng.integers(2)))
    target = int(rng.integers(vocabulary)) if rng.random() < 0.5 else NO_TOKEN
    return RowSampling(parameters, random_edits(rng, vocabulary), logprobs, target)


def random_edits(rng: np.random.Generator, vocabulary: int) -> LogitEdits:
    """Return edits, some for tokens outside the vocabulary, and some that ban everything."""
    num_edits = min(int(rng.choice([0, 0, 1, 7, 100])), vocabulary)
    offsets = rng.normal(0, 2, num_edits).astype(np.float32)
    offsets[rng.random(num_edits) < 0.2] = -math.inf
    allowed = None
    if rng.random() < 0.3:
        share = rng.choice([0.0, 0.01, 0.5, 0.99])
        bits = rng.random(-(-vocabulary // 32) * 32) < share
        allowed = np.packbits(bits, bitorder="little").view(np.uint32)
    return LogitEdits(
        position=int(rng.integers(1 << 32)),
        ids=rng.permutation(vocabulary + 20)[:num_edits].astype(np.int64),
        is_repeated=rng.random(num_edits) < 0.5,
        offsets=offsets,
        allowed=allowed,
    )
