"""One sampler for all runners: tokens, and the ranking of the next-best ones."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amusd.engine.interface import NO_TOKEN
from amusd.engine.sampling.sampler import GREEDY, Ranking, Sampler

# 2 outputs of a head with 5 rows
LOGITS = torch.tensor([[0.0, 3.0, 1.0, 3.0, 7.0], [2.0, 1.0, 0.0, -1.0, 7.0]])
HEAD_IDS = torch.tensor([10, 20, 30, 40, 50])
RANKING = Sampler(HEAD_IDS, num_alternatives=2)


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
    assert RANKING.rankings(RANKING.rank(LOGITS[:0])) == []
    assert Sampler(HEAD_IDS).pick(np.zeros(0, np.int64), np.zeros(0, np.float32)) == []


few_values = st.lists(st.integers(-2, 2), min_size=12, max_size=12)  # so that many are equal


@given(
    st.lists(few_values, min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(2, 12),
    st.booleans(),
)
@settings(deadline=None)
def test_a_ranking_has_the_likeliest_tokens_and_their_probabilities(
    rows: list[list[int]], num_alternatives: int, num_outputs: int, is_reduced: bool
) -> None:
    logits = torch.tensor(rows, dtype=torch.float32)  # [outputs, 12]
    ids = torch.arange(12) * 7 % 13 if is_reduced else torch.arange(12)
    sampler = Sampler(ids if is_reduced else None, num_outputs, num_alternatives)
    found = sampler.rankings(sampler.rank(logits))
    assert [one.tokens[0] for one in found] == sampler.sample(logits).tolist()
    expected = logits[:, :num_outputs].softmax(dim=-1)
    for one, shares in zip(found, expected, strict=True):
        assert len(one.tokens) == len(one.probabilities) == min(num_outputs, 1 + num_alternatives)
        assert len(set(one.tokens)) == len(one.tokens)
        by_token = dict(zip(ids.tolist(), shares.tolist(), strict=False))
        assert one.probabilities == pytest.approx([by_token[token] for token in one.tokens])
        best = shares.topk(len(one.tokens)).values.tolist()
        assert one.probabilities == pytest.approx(best)


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


def test_an_output_that_is_not_finite_has_no_next_best_tokens() -> None:
    rows = torch.tensor([[0.0, NAN, 1.0, 3.0, 0.0], [-INFINITY] * 5])
    assert RANKING.rankings(RANKING.rank(rows)) == [Ranking((NO_TOKEN,), (0.0,))] * 2


def test_masked_tokens_are_not_among_the_next_best() -> None:
    [found] = RANKING.rankings(
        RANKING.rank(torch.tensor([[-INFINITY, 1.0, 1.0] + [-INFINITY] * 2]))
    )
    assert found == Ranking((20, 30), (0.5, 0.5))


def test_a_largest_logit_that_is_not_finite_gives_no_token() -> None:
    largest = np.array([NAN, 1.0, INFINITY, -INFINITY], np.float32)
    rows = np.array([0, 1, 2, 3])
    assert GREEDY.pick(rows, largest) == [NO_TOKEN, 1, NO_TOKEN, NO_TOKEN]
    assert Sampler(HEAD_IDS).pick(rows, largest) == [NO_TOKEN, 20, NO_TOKEN, NO_TOKEN]
