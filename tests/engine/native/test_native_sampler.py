"""The native sampler gives the tokens of the reference, for every row and every way to sample."""

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from amusd.engine.interface import NO_TOKEN, NOTHING_ALLOWED, WeightFormat
from amusd.engine.native.library import library, unavailable_reason
from amusd.engine.native.native_model import NativeModel
from amusd.engine.native.native_runner import NativeRunner
from amusd.engine.native.native_sampler import GROUP, NativeSampler
from amusd.engine.runners.runner import Chunk
from amusd.engine.sampling.noise import gumbel_noise
from amusd.engine.sampling.reference_sampler import (
    LogitEdits,
    RowSampling,
    Sampled,
    sample,
    sample_row,
)
from amusd.engine.sampling.sampler import GREEDY, Sampler
from amusd.sampling.parameters import LogprobsOptions, SamplingParameters, TokenLogprobs
from tests import tiny
from tests.engine.native.sampling_cases import random_edits, random_logits, random_row

pytestmark = pytest.mark.skipif(
    unavailable_reason() is not None, reason=f"no native engine: {unavailable_reason()}"
)

WIDTHS = (1, 5, 16, 63, 64, 65, 300, 1000, 4099)
NO_EDITS = LogitEdits(7, np.empty(0, np.int64), np.empty(0, np.bool_), np.empty(0, np.float32))


def sampler_of(
    width: int, head_ids: npt.NDArray[np.int64] | None = None, num_alternatives: int = 0
) -> NativeSampler:
    vocabulary = width if head_ids is None else 3 * width
    return NativeSampler(library(), width, vocabulary, head_ids, num_alternatives)


def assert_same(found: Sampled, expected: Sampled, num_alternatives: int) -> None:
    """Same tokens; probabilities and log-probabilities up to rounding."""
    assert found.tokens == expected.tokens
    if num_alternatives:
        assert found.probabilities == pytest.approx(expected.probabilities, rel=1e-5, abs=1e-7)
    assert (found.logprobs is None) == (expected.logprobs is None)
    if found.logprobs is not None and expected.logprobs is not None:
        assert_same_logprobs(found.logprobs, expected.logprobs)


def assert_same_logprobs(found: TokenLogprobs, expected: TokenLogprobs) -> None:
    possible = [one for one in expected.top if one[1] > -math.inf]
    assert found.token == expected.token
    assert found.logprob == pytest.approx(expected.logprob, rel=1e-9, abs=1e-9)
    assert [token for token, _ in found.top] == [token for token, _ in possible]
    assert [value for _, value in found.top] == pytest.approx(
        [value for _, value in possible], rel=1e-9, abs=1e-9
    )


def test_the_noise_has_the_bits_of_the_reference() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        seed, position = int(rng.integers(1 << 64, dtype=np.uint64)), int(rng.integers(1 << 32))
        ids = rng.integers(0, 200_000, 2003)
        found = np.empty(len(ids))
        library().amusd_noise(seed, position, ids.ctypes.data, len(ids), found.ctypes.data)
        expected = gumbel_noise(seed, position, ids)
        assert np.array_equal(found.view(np.int64), expected.view(np.int64))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the reference, where all is equal
@pytest.mark.parametrize("is_reduced", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_its_tokens_and_log_probabilities_are_those_of_the_reference(
    width: int, is_reduced: bool
) -> None:
    rng = np.random.default_rng(width)
    vocabulary = 3 * width if is_reduced else width
    for _ in range(40):
        head_ids = rng.permutation(vocabulary)[:width] if is_reduced else None
        num_alternatives = int(rng.integers(5))
        rows = [random_row(rng, width, vocabulary) for _ in range(3)]
        logits = np.stack([random_logits(rng, width) for _ in rows])
        found = sampler_of(width, head_ids, num_alternatives).sample(logits, rows)
        for one, values, row in zip(found, logits, rows, strict=True):
            expected = sample_row(values, row, head_ids, num_alternatives)
            assert_same(one, expected, num_alternatives)


@pytest.mark.parametrize("temperature", [0.01, 0.2, 1.0, 5.0, 100.0])
@pytest.mark.parametrize("spread", [0.0, 1e-4, 1.0, 30.0, 1e4])
def test_the_bound_that_rules_tokens_out_never_rules_out_the_best(
    temperature: float, spread: float
) -> None:
    """Millions of tokens, with the best five of each row against the exact scores of all."""
    rng = np.random.default_rng(5)
    width, ids = 49_152, np.arange(49_152)
    sampler = sampler_of(width, num_alternatives=4)
    for seed in range(6):
        parameters = SamplingParameters(temperature=temperature, seed=seed)
        logits = (spread * rng.normal(size=width) + rng.normal() * spread).astype(np.float32)
        scores = logits.astype(np.float64) / temperature + gumbel_noise(seed, 7, ids)
        best = np.argsort(-scores, kind="stable")[:5]
        (found,) = sampler.sample(logits[None], [RowSampling(parameters, NO_EDITS)])
        assert found.tokens == tuple(best.tolist())


@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
def test_tokens_whose_scores_nearly_tie_are_told_apart(temperature: float) -> None:
    """Each logit is set so that all scores are equal up to the rounding of a float."""
    ids = np.arange(4096)
    sampler = sampler_of(len(ids), num_alternatives=4)
    for seed in range(20):
        noise = gumbel_noise(seed, 7, ids)
        logits = (temperature * (100.0 - noise)).astype(np.float32)
        row = RowSampling(SamplingParameters(temperature=temperature, seed=seed), NO_EDITS)
        (found,) = sampler.sample(logits[None], [row])
        expected = sample(logits, NO_EDITS, row.parameters, num_alternatives=4)
        assert found.tokens == expected.tokens


@pytest.mark.parametrize("parameters", [
    SamplingParameters(temperature=1.0, top_k=40),
    SamplingParameters(temperature=1.0, top_k=5000),
    SamplingParameters(temperature=0.7, top_p=0.95),
    SamplingParameters(temperature=100.0, top_p=0.9),
    SamplingParameters(temperature=2.0, top_k=20_000, top_p=0.999, min_p=1e-4),
])  # fmt: skip
def test_filters_keep_what_the_reference_keeps_of_a_large_vocabulary(
    parameters: SamplingParameters,
) -> None:
    rng = np.random.default_rng(6)
    sampler = sampler_of(49_152)
    for seed in range(4):
        logits = rng.normal(0, 3, 49_152).astype(np.float32)
        row = RowSampling(replace(parameters, seed=seed), NO_EDITS)
        row = replace(row, logprobs=LogprobsOptions(20, is_processed=True))
        (found,) = sampler.sample(logits[None], [row])
        assert_same(found, sample_row(logits, row), 0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_token_says_why_and_harms_no_other(temperature: float) -> None:
    logits = np.zeros((4, 70), dtype=np.float32)
    logits[0, 69], logits[1, 3] = math.nan, math.inf
    banned = replace(NO_EDITS, allowed=np.zeros(3, dtype=np.uint32))
    options = LogprobsOptions(2)
    row = RowSampling(SamplingParameters(temperature=temperature), NO_EDITS, options)
    found = sampler_of(70).sample(logits, [row, row, replace(row, edits=banned), row])
    assert [one.tokens[0] for one in found[:3]] == [NO_TOKEN, NO_TOKEN, NOTHING_ALLOWED]
    assert [one.logprobs for one in found[:3]] == [None] * 3
    assert found[3] == replace(sample_row(logits[3], row), probabilities=())


def test_a_mask_that_is_shorter_than_the_vocabulary_bans_the_rest() -> None:
    edits = replace(NO_EDITS, allowed=np.full(2, 0xFFFFFFFF, dtype=np.uint32))
    logits = np.arange(100, dtype=np.float32)
    (found,) = sampler_of(100).sample(logits[None], [RowSampling(SamplingParameters(), edits)])
    assert found.tokens == (63,)


def test_edits_of_different_lengths_and_logits_of_another_shape_are_refused() -> None:
    sampler = sampler_of(64)
    edits = replace(NO_EDITS, ids=np.arange(3))
    with pytest.raises(ValueError, match="broadcast"):
        sampler.prepare([RowSampling(SamplingParameters(), edits)])
    row = RowSampling(SamplingParameters(), NO_EDITS)
    with pytest.raises(ValueError, match="logits of shape"):
        sampler.sample(np.zeros((1, 63), dtype=np.float32), [row])


@pytest.mark.parametrize("num_alternatives", [0, 4])
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("head", ["full", "reduced"])
def test_a_runner_samples_its_own_logits_in_any_batch(
    head: str, num_threads: int, num_alternatives: int
) -> None:
    """Plain and sampled sequences in one batch, with more outputs than a group holds."""
    rng = np.random.default_rng(8)
    head_ids = None if head == "full" else rng.permutation(tiny.VOCABULARY)
    model = NativeModel(tiny.build("llama"), WeightFormat.COMPACT)
    runner = NativeRunner(model, _sampler(head_ids, num_alternatives), 400, num_threads)
    sizes = (GROUP + 3, 1, 5)
    rows = [
        [random_row(rng, tiny.VOCABULARY, tiny.VOCABULARY) for _ in range(size)] for size in sizes
    ]
    batch = [
        Chunk(runner.allocate(400), 0, rng.integers(0, 256, size + 2).tolist(), size, how)
        for size, how in zip(sizes, (rows[0], (), rows[2]), strict=True)
    ]
    logits = runner.logits(batch).numpy()
    plain = RowSampling(SamplingParameters(), NO_EDITS)
    expected = [
        sample_row(values, row, head_ids, num_alternatives)
        for values, row in zip(logits, [*rows[0], plain, *rows[2]], strict=True)
    ]
    for one, other in zip(runner.sample(batch), expected, strict=True):
        assert_same(one, other, num_alternatives)


@pytest.fixture(scope="module")
def wide_model() -> LlamaForCausalLM:
    """A model whose head has several slices of panels for each of three threads."""
    sizes: dict[str, Any] = tiny.COMMON | {"vocab_size": 4099}
    torch.manual_seed(5)
    return LlamaForCausalLM(LlamaConfig(**sizes, **tiny.NO_SPECIAL))


@pytest.mark.parametrize("num_alternatives", [0, 4])
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("is_reduced", [False, True])
def test_tokens_found_while_the_head_is_computed_are_those_of_the_reference(
    wide_model: LlamaForCausalLM, is_reduced: bool, num_threads: int, num_alternatives: int
) -> None:
    rng = np.random.default_rng(10)
    head_ids = rng.permutation(4099) if is_reduced else None
    model = NativeModel(wide_model, WeightFormat.COMPACT)
    runner = NativeRunner(model, _sampler(head_ids, num_alternatives), 400, num_threads)
    size = GROUP + 8
    temperatures = np.geomspace(0.05, 100, size)
    rows = [
        RowSampling(
            SamplingParameters(temperature=float(temperature), seed=at), _at_position(1000 + at)
        )
        for at, temperature in enumerate(temperatures)
    ]
    batch = [
        Chunk(runner.allocate(400), 0, rng.integers(0, 4099, size).tolist(), size, rows),
        Chunk(runner.allocate(400), 0, [5, 6], 2, [rows[3], replace(rows[4], edits=_BAN)]),
        Chunk(runner.allocate(400), 0, [7], 1),
    ]
    plain = RowSampling(SamplingParameters(), NO_EDITS)
    every = [*rows, *batch[1].rows, plain]
    logits = runner.logits(batch).numpy()
    found = runner.sample(batch)
    for one, values, row in zip(found, logits, every, strict=True):
        assert_same(one, sample_row(values, row, head_ids, num_alternatives), num_alternatives)
    assert len({one.tokens[0] for one in found}) > size // 2


@pytest.mark.parametrize("num_threads", [1, 3])
def test_logits_that_are_not_finite_leave_no_token_while_the_head_is_computed(
    wide_model: LlamaForCausalLM, num_threads: int
) -> None:
    broken = deepcopy(wide_model)
    with torch.no_grad():
        broken.lm_head.weight[2500] = math.nan
    runner = NativeRunner(NativeModel(broken, WeightFormat.COMPACT), GREEDY, 400, num_threads)
    row = RowSampling(SamplingParameters(temperature=1.0), NO_EDITS)
    (found,) = runner.sample([Chunk(runner.allocate(400), 0, [5], 1, [row])])
    assert found.tokens == (NO_TOKEN,)


_BAN = LogitEdits(7, np.arange(9), np.zeros(9, np.bool_), np.full(9, -np.inf, np.float32))


def _at_position(position: int) -> LogitEdits:
    return replace(NO_EDITS, position=position)


def _sampler(head_ids: npt.NDArray[np.int64] | None, num_alternatives: int) -> Sampler:
    ids = None if head_ids is None else torch.from_numpy(head_ids)
    return Sampler(ids, None, num_alternatives)


def test_edits_of_earlier_batches_are_gone() -> None:
    rng = np.random.default_rng(9)
    sampler = sampler_of(300)
    logits = rng.normal(size=(2, 300)).astype(np.float32)
    for count in (1, 2, 1):
        rows = [
            RowSampling(SamplingParameters(repetition_penalty=1.3), random_edits(rng, 300))
            for _ in range(count)
        ]
        found = sampler.sample(logits[:count], rows)
        for one, values, row in zip(found, logits, rows, strict=False):
            assert one.tokens == sample_row(values, row).tokens
