"""The sampler in PyTorch gives what the reference gives."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amusd.engine.interface import NO_TOKEN, NOTHING_ALLOWED
from amusd.engine.sampling import noise, torch_noise
from amusd.engine.sampling.reference_sampler import (
    LogitEdits,
    RowSampling,
    Sampled,
    sample_row,
)
from amusd.engine.sampling.sampler import Sampler
from amusd.sampling.parameters import LogprobsOptions, SamplingParameters
from tests.engine.sampling.random_sampling import parameters

VOCABULARY = 100
HEAD_IDS = np.array([token for token in range(VOCABULARY) if token % 3])


def test_the_noise_has_the_bits_of_the_reference() -> None:
    words = np.random.default_rng(2).integers(0, 2**32, 200_000)
    words[:4] = 0, 1, 2**31, 2**32 - 1
    expected = noise.gumbel_of(words.astype(np.uint64))
    bits = torch.from_numpy(words)
    assert np.array_equal(torch_noise.gumbel_of(bits).numpy(), expected)
    assert np.abs(torch_noise.nearly_gumbel_of(bits).numpy() - expected).max() < 1e-12


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_random_words_are_those_of_the_reference(seed: int, position: int) -> None:
    blocks = np.array([0, 1, 2**17, 2**30 - 1])
    key = (seed & 0xFFFFFFFF, seed >> 32)
    counter = np.zeros((4, len(blocks)), dtype=np.uint64)
    counter[0], counter[1] = blocks, position
    keys = torch.tensor([key[0]]), torch.tensor([key[1]])
    found = torch_noise.philox(torch.from_numpy(blocks), torch.tensor([position]), keys)
    assert np.array_equal(torch.stack(found).numpy(), noise.philox(counter, key).astype(np.int64))


def edits(
    position: int = 0, ids: npt.ArrayLike = (), offsets: npt.ArrayLike = (), **others: object
) -> LogitEdits:
    found = np.array(ids, dtype=np.int64)
    repeated = others.get("is_repeated", np.zeros(len(found), dtype=np.bool_))
    assert isinstance(repeated, np.ndarray)
    mask = others.get("allowed")
    assert mask is None or isinstance(mask, np.ndarray)
    return LogitEdits(position, found, repeated, np.array(offsets, dtype=np.float32), mask)


@st.composite
def rows(draw: st.DrawFn) -> RowSampling | None:
    """Return the sampling of an output with random edits; None: the largest logit wins."""
    if draw(st.integers(0, 7)) == 0:
        return None
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids = chance.permutation(VOCABULARY)[: draw(st.integers(0, VOCABULARY))]
    offsets = chance.normal(size=len(ids)) * 2
    offsets[chance.random(len(ids)) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -np.inf
    allowed = chance.integers(0, 2**32, -(-VOCABULARY // 32)).astype(np.uint32)
    options = st.builds(LogprobsOptions, num_top=st.integers(0, 20), is_processed=st.booleans())
    return RowSampling(
        draw(parameters(VOCABULARY)),
        edits(
            draw(st.integers(0, 2**20)),
            ids,
            offsets,
            is_repeated=chance.random(len(ids)) < 0.5,
            allowed=allowed if draw(st.booleans()) else None,
        ),
        draw(st.none() | options),
        draw(st.integers(-1, VOCABULARY + 5)),
    )


def assert_same(found: Sampled, expected: Sampled) -> None:
    assert found.tokens == expected.tokens
    assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-9)
    assert (found.logprobs is None) == (expected.logprobs is None)
    if found.logprobs is not None and expected.logprobs is not None:
        assert found.logprobs.token == expected.logprobs.token
        assert found.logprobs.logprob == pytest.approx(expected.logprobs.logprob, abs=1e-9)
        pairs = (found.logprobs.top, expected.logprobs.top)
        ours, theirs = ([value for _, value in top] for top in pairs)
        assert ours == pytest.approx(theirs, abs=1e-9)


@given(st.lists(rows(), min_size=1, max_size=6), st.integers(0, 2**32), st.data())
@settings(deadline=None, max_examples=120)
def test_every_batch_of_rows_gives_what_the_reference_gives(
    batch: list[RowSampling | None], seed: int, data: st.DataObject
) -> None:
    is_reduced, num_alternatives = data.draw(st.booleans()), data.draw(st.integers(0, 4))
    ids = HEAD_IDS if is_reduced else None
    size = len(HEAD_IDS) if is_reduced else VOCABULARY
    chance = np.random.default_rng(seed)
    logits = chance.normal(size=(len(batch), size)).astype(np.float32) * chance.uniform(0.1, 8)
    if data.draw(st.booleans()):
        logits = logits.round()  # so that many are equal
    head = None if ids is None else torch.from_numpy(ids)
    sampler = Sampler(head, num_alternatives=num_alternatives)
    found = sampler.sample_rows(torch.from_numpy(logits), batch)
    for one, values, row in zip(found, logits, batch, strict=True):
        plain = RowSampling(SamplingParameters(), edits())
        assert_same(one, sample_row(values, row or plain, ids, num_alternatives))


HOT = SamplingParameters(temperature=1.0, seed=3)
NAN, INFINITY = float("nan"), float("inf")


def test_a_row_that_has_no_token_leaves_the_others_alone() -> None:
    logits = torch.zeros(5, VOCABULARY)
    logits[1, 7], logits[2, 7] = NAN, INFINITY
    banned = edits(4, np.arange(VOCABULARY), [-INFINITY] * VOCABULARY)
    batch = [RowSampling(HOT, edits(at)) for at in range(5)]
    batch[3] = RowSampling(HOT, banned, LogprobsOptions(2))
    found = Sampler(num_alternatives=2).sample_rows(logits, batch)
    assert [one.tokens[0] for one in found[1:4]] == [NO_TOKEN, NO_TOKEN, NOTHING_ALLOWED]
    assert found[3].logprobs is None
    for at in (0, 4):
        assert_same(found[at], sample_row(logits[at].numpy(), batch[at], None, 2))


@pytest.mark.parametrize("size", [100, 3000])  # the candidates among equal ones differ
def test_more_equal_tokens_than_candidates_are_left_to_the_reference(size: int) -> None:
    logits = np.zeros((1, size), dtype=np.float32)
    row = RowSampling(SamplingParameters(), edits(0, [5], [-1.0]))
    [found] = Sampler(num_alternatives=3).sample_rows(torch.from_numpy(logits), [row])
    assert found.tokens == (0, 1, 2, 3)


SHARES = np.array([0.2, 0.35, 0.15, 0.3])


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 0]),
        ({"top_p": 0.34}, [1]),
        ({"top_p": 0.36}, [1, 3]),
        ({"top_p": 0.64}, [1, 3]),
        ({"top_p": 0.66}, [1, 3, 0]),
        ({"min_p": 0.5}, [1, 3, 0]),
        ({"min_p": 0.6}, [1, 3]),
        ({"top_k": 3, "top_p": 0.8, "min_p": 0.1}, [1, 3, 0]),  # 0.35 and 0.3 are 0.76 of 3
        ({"top_k": 3, "top_p": 0.75}, [1, 3]),
    ],
)
def test_filters_keep_the_likeliest_tokens(filters: dict[str, Any], kept: list[int]) -> None:
    logits = np.log(SHARES).astype(np.float32)[None]
    asked = SamplingParameters(temperature=1.0, **filters)
    row = RowSampling(asked, edits(), LogprobsOptions(4, is_processed=True))
    [found] = Sampler().sample_rows(torch.from_numpy(logits), [row])
    for one in (found, sample_row(logits[0], row)):
        assert one.logprobs is not None
        assert [token for token, _ in one.logprobs.top] == kept
        expected = np.log(SHARES[kept] / SHARES[kept].sum())
        assert [value for _, value in one.logprobs.top] == pytest.approx(expected.tolist())


def test_large_vocabularies_and_many_rows_are_sampled_in_groups() -> None:
    chance = np.random.default_rng(5)
    logits = chance.normal(size=(20, 50_000)).astype(np.float32)
    batch = [RowSampling(HOT, edits(at)) for at in range(20)]
    found = Sampler().sample_rows(torch.from_numpy(logits), batch)
    expected = [sample_row(values, row) for values, row in zip(logits, batch, strict=True)]
    assert [one.tokens for one in found] == [one.tokens for one in expected]


def test_logits_of_half_precision_are_sampled_in_float32() -> None:
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(1)).bfloat16()
    batch = [RowSampling(HOT, edits(at)) for at in range(3)]
    found = Sampler().sample_rows(logits, batch)
    for one, values, row in zip(found, logits.float().numpy(), batch, strict=True):
        assert_same(one, sample_row(values, row))


def test_no_rows_give_no_samples() -> None:
    assert Sampler().sample_rows(torch.zeros(0, VOCABULARY), []) == []
