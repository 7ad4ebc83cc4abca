"""Sampled frequencies are those of the distribution, and coupled samples agree as often as can be.

Statistics have fixed seeds, so the tests are repeatable. A critical value has a chance of 1e-6.
"""

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch

from amusd.engine.sampling.noise import gumbel_of, philox
from amusd.engine.sampling.reference_sampler import (
    LogitEdits,
    Logits,
    RowSampling,
    edited,
    kept_scores,
)
from amusd.engine.sampling.sampler import Sampler
from amusd.sampling.parameters import SamplingParameters

VOCABULARY, NUM_DRAWS, SEED = 64, 100_000, 12345
LOGITS = np.random.default_rng(7).normal(size=VOCABULARY).astype(np.float32) * 2
BIASED = np.arange(5, dtype=np.int64)
CASES = {
    "temperature 1": SamplingParameters(temperature=1.0),
    "temperature 0.5": SamplingParameters(temperature=0.5),
    "temperature 2": SamplingParameters(temperature=2.0),
    "top-k": SamplingParameters(temperature=1.0, top_k=10),
    "top-p": SamplingParameters(temperature=1.2, top_p=0.8),
    "min-p": SamplingParameters(temperature=0.8, min_p=0.05),
    "all filters": SamplingParameters(temperature=1.5, top_k=30, top_p=0.9, min_p=0.02),
    "penalty": SamplingParameters(temperature=1.0, repetition_penalty=1.4),
}


def edits_at(position: int) -> LogitEdits:
    repeated = np.ones(len(BIASED), dtype=np.bool_)
    return LogitEdits(position, BIASED, repeated, np.full(len(BIASED), 0.5, dtype=np.float32))


Noise = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def noise() -> Noise:
    """The noise of all tokens at each position, [draws, vocabulary]."""
    counter = np.zeros((4, NUM_DRAWS, VOCABULARY // 4), dtype=np.uint64)
    counter[0] = np.arange(VOCABULARY // 4)
    counter[1] = np.arange(NUM_DRAWS)[:, None]
    words = philox(counter.reshape(4, -1), (SEED, 0))  # [4, draws * blocks]
    bits = words.T.reshape(NUM_DRAWS, VOCABULARY)
    return np.concatenate([gumbel_of(part) for part in np.array_split(bits, 20)])


def draw(logits: Logits, asked: SamplingParameters, noise: Noise) -> npt.NDArray[np.int64]:
    """Return the token at each position, [draws]."""
    scores = kept_scores(edited(logits, edits_at(0), asked, None), asked)
    return np.concatenate([(scores + part).argmax(axis=1) for part in np.array_split(noise, 20)])


@pytest.mark.parametrize("name", CASES)
def test_a_draw_is_what_the_sampler_gives(name: str, noise: Noise) -> None:
    asked = replace(CASES[name], seed=SEED)
    rows = [RowSampling(asked, edits_at(position)) for position in range(200)]
    many = torch.from_numpy(LOGITS).expand(len(rows), -1)
    found = [one.tokens[0] for one in Sampler().sample_rows(many, rows)]
    assert found == draw(LOGITS, asked, noise[: len(rows)]).tolist()


def distribution(logits: Logits, asked: SamplingParameters) -> npt.NDArray[np.float64]:
    scores = kept_scores(edited(logits, edits_at(0), asked, None), asked)
    shares = np.exp(scores - scores.max())
    found: npt.NDArray[np.float64] = shares / shares.sum()
    return found


def critical(num_degrees: int) -> float:
    """Return the chi-square value that is exceeded with a chance of 1e-6 (Wilson-Hilferty)."""
    spread = 2.0 / (9.0 * num_degrees)
    return num_degrees * (1.0 - spread + 4.7534 * math.sqrt(spread)) ** 3


def chi_square(counts: npt.NDArray[np.int64], shares: npt.NDArray[np.float64]) -> tuple[float, int]:
    """Return the statistic and its degrees of freedom; rare tokens share a class."""
    expected = shares * counts.sum()
    is_rare = expected < 10
    classes = [*zip(counts[~is_rare], expected[~is_rare], strict=True)]
    if expected[is_rare].sum() > 0:
        classes.append((counts[is_rare].sum(), expected[is_rare].sum()))
    return sum((one - other) ** 2 / other for one, other in classes), len(classes) - 1


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_those_of_the_distribution(name: str, noise: Noise) -> None:
    asked = CASES[name]
    shares = distribution(LOGITS, asked)
    counts = np.bincount(draw(LOGITS, asked, noise), minlength=VOCABULARY)
    assert not counts[shares == 0].any()
    statistic, num_degrees = chi_square(counts, shares)
    assert statistic < critical(num_degrees)


def test_the_statistic_notices_a_distribution_that_is_off_by_a_little(noise: Noise) -> None:
    asked = CASES["temperature 1"]
    counts = np.bincount(draw(LOGITS, asked, noise), minlength=VOCABULARY)
    other = distribution(LOGITS, SamplingParameters(temperature=1.03, repetition_penalty=1.0))
    statistic, num_degrees = chi_square(counts, other)
    assert statistic > critical(num_degrees)


@pytest.mark.parametrize("difference", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_coupled_samples_agree_as_often_as_the_bound_says(
    difference: float, temperature: float, noise: Noise
) -> None:
    asked = SamplingParameters(temperature=temperature)
    change = np.random.default_rng(3).normal(size=VOCABULARY).astype(np.float32)
    other = LOGITS + np.float32(difference) * change
    p, q = distribution(LOGITS, asked), distribution(other, asked)
    distance = 0.5 * np.abs(p - q).sum()
    agree = draw(LOGITS, asked, noise) == draw(other, asked, noise)
    bound = (1.0 - distance) / (1.0 + distance)  # Daliri et al., theorem 1
    error = 5.0 * math.sqrt(0.25 / NUM_DRAWS)
    assert bound - error < agree.mean() < 1.0 - distance + error
