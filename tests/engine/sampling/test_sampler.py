"""One sampler for all runners: searching logits in parts gives the same tokens as at once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amusd.engine.interface import NO_TOKEN
from amusd.engine.sampling.sampler import GREEDY, Sampler

# 2 outputs of a head with 5 rows
LOGITS = torch.tensor([[0.0, 3.0, 1.0, 3.0, 7.0], [2.0, 1.0, 0.0, -1.0, 7.0]])
HEAD_IDS = torch.tensor([10, 20, 30, 40, 50])


@pytest.mark.parametrize(
    ("sampler", "tokens"),
    [
        (GREEDY, [4, 4]),
        (Sampler(num_outputs=4), [1, 0]),
        (Sampler(HEAD_IDS), [50, 50]),
        (Sampler(HEAD_IDS, num_outputs=4), [20, 10]),
    ],
)
def test_the_largest_logit_of_the_allowed_rows_wins(sampler: Sampler, tokens: list[int]) -> None:
    assert sampler.sample(LOGITS).tolist() == tokens
    assert sampler.sample(LOGITS[None]).tolist() == [tokens]
    assert sampler.sample(LOGITS).dtype is torch.int64


def test_no_outputs_give_no_tokens() -> None:
    assert GREEDY.sample(LOGITS[:0]).tolist() == []
    for num_parts in (1, 3):
        empty = np.zeros((num_parts, 0))
        assert Sampler(HEAD_IDS).merge(empty.astype(np.float32), empty.astype(np.int64)) == []


few_values = st.lists(st.integers(-2, 2), min_size=12, max_size=12)  # so that many are equal


@given(st.lists(few_values, min_size=1, max_size=4), st.integers(1, 5), st.booleans())
@settings(deadline=None)
def test_parts_merge_to_the_tokens_of_the_whole(
    rows: list[list[int]], num_parts: int, is_reduced: bool
) -> None:
    logits = torch.tensor(rows, dtype=torch.float32)  # [outputs, 12]
    sampler = Sampler(torch.arange(12) * 7 % 13 if is_reduced else None)
    bounds = [12 * part // num_parts for part in range(num_parts + 1)]
    parts = [logits[:, bounds[i] : bounds[i + 1]] for i in range(num_parts)]
    maxima = torch.stack([part.max(dim=-1).values for part in parts])
    found = torch.stack([part.argmax(dim=-1) + bounds[i] for i, part in enumerate(parts)])
    assert sampler.merge(maxima.numpy(), found.numpy()) == sampler.sample(logits).tolist()


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("sampler", [GREEDY, Sampler(HEAD_IDS), Sampler(num_outputs=4)])
def test_logits_that_are_not_finite_have_no_token(sampler: Sampler) -> None:
    rows = [
        [0.0, NAN, 1.0, 3.0, 0.0],
        [0.0, INFINITY, 1.0, 3.0, 0.0],
        [-INFINITY] * 5,
        [-INFINITY, 1.0, 0.0, 0.0, 0.0],  # some tokens may be masked
    ]
    tokens = sampler.sample(torch.tensor(rows)).tolist()
    assert tokens[:3] == [NO_TOKEN] * 3
    assert tokens[3] in (1, 20)


def test_rows_that_are_not_sampled_may_hold_anything() -> None:
    assert Sampler(num_outputs=2).sample(torch.tensor([[1.0, 2.0, NAN]])).tolist() == [1]


@pytest.mark.parametrize("num_parts", [1, 2])
def test_a_part_that_is_not_finite_leaves_the_whole_without_a_token(num_parts: int) -> None:
    maxima = np.array([[NAN, 1.0, INFINITY, -INFINITY], [2.0, 2.0, 2.0, -INFINITY]], np.float32)
    rows = np.array([[0, 1, 2, 3], [4, 4, 4, 4]])
    for sampler in (GREEDY, Sampler(HEAD_IDS)):
        found = sampler.merge(maxima[:num_parts], rows[:num_parts])
        assert [token == NO_TOKEN for token in found] == [True, False, True, True]
