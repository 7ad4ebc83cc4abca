"""The edits of a sequence: by definition, for any chunks and rollbacks, and at a constant cost."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amusd.engine.interface import NO_TOKEN, NOTHING_ALLOWED, ScheduledSequence
from amusd.engine.sampling.reference_sampler import RowSampling, edited
from amusd.engine.sampling.sequence_sampler import (
    Mask,
    SequenceSampler,
    open_sampler,
)
from amusd.engine.sampling.token_edits import bitmask
from amusd.protocol.errors import InvalidInputError
from amusd.sampling.parameters import (
    MAX_NGRAM_SIZE,
    Constraint,
    ConstraintKind,
    LogprobsOptions,
    SamplingParameters,
    SequenceSampling,
)
from tests.engine.sampling.random_sampling import processed, samplings

VOCABULARY = 40
LOGITS = np.random.default_rng(1).normal(size=VOCABULARY).astype(np.float32) * 3


def logits_of(row: RowSampling) -> npt.NDArray[np.float32]:
    return edited(LOGITS, row.edits, row.parameters, None)


def append(
    sampler: SequenceSampler, tokens: Sequence[int], num_outputs: int, targets: Sequence[int] = ()
) -> list[RowSampling]:
    return sampler.append(ScheduledSequence(0, tokens, num_outputs, targets=targets))


@st.composite
def histories(draw: st.DrawFn) -> tuple[SequenceSampling, list[tuple[int, list[int], int]]]:
    """Return a sampling, and steps: the length to roll back to, tokens, and number of outputs."""
    sampling = draw(samplings(VOCABULARY, draw(st.integers(0, 6))))
    steps, length = [], 0
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, length))
        tokens = draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))  # so that many repeat
        steps.append((start, tokens, draw(st.integers(0, len(tokens)))))
        length = start + len(tokens)
    return sampling, steps


@given(histories())
@settings(deadline=None, max_examples=150)
def test_edits_follow_from_the_tokens_before_whatever_the_chunks_and_rollbacks(
    history: tuple[SequenceSampling, list[tuple[int, list[int], int]]],
) -> None:
    sampling, steps = history
    sampler = SequenceSampler(sampling, VOCABULARY)
    text: list[int] = []
    for start, tokens, num_outputs in steps:
        sampler.truncate(start)
        del text[start:]
        rows = append(sampler, tokens, num_outputs)
        assert len(rows) == num_outputs
        first = start + len(tokens) - num_outputs + 1
        text += tokens
        for position, row in enumerate(rows, start=first):
            assert row.edits.position == position
            assert len(set(row.edits.ids.tolist())) == len(row.edits.ids)
            expected = processed(LOGITS, text[:position], sampling)
            np.testing.assert_array_equal(logits_of(row), expected)


def test_a_long_prompt_is_counted_once() -> None:
    asked = SamplingParameters(
        repetition_penalty=1.2, frequency_penalty=0.5, no_repeat_ngram_size=3
    )
    prompt = [token * token % 5000 for token in range(8192)]
    sampler = SequenceSampler(SequenceSampling(asked, len(prompt)), 5000)
    sampler.extend(prompt)
    pushes = 0
    push = sampler._push

    def counting(token: int) -> None:
        nonlocal pushes
        pushes += 1
        push(token)

    sampler._push = counting  # type: ignore[method-assign]
    for step in range(10):
        append(sampler, [7, 8, step], 3)
        sampler.truncate(len(prompt) + step)
    assert pushes == 30


class CountingMasks:
    """Allows the token after the last one, modulo 7; records what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], list[int]]] = []

    def masks(self, output: Sequence[int], pending: Sequence[int]) -> list[Mask]:
        self.asked.append((list(output), list(pending)))
        text = [0, *output, *pending]
        return [
            bitmask(((text[at] + 1) % 7,), 7) for at in range(len(output), len(text))
        ]  # a mask that is shorter than the vocabulary

    def prepare(self, constraint: Constraint) -> None:
        pass

    def state(self, constraint: Constraint) -> "CountingMasks":
        return self


ANY = SamplingParameters(constraint=Constraint(ConstraintKind.JSON_OBJECT))


def allowed(row: RowSampling) -> list[int]:
    return np.flatnonzero(np.isfinite(logits_of(row))).tolist()


def test_a_constraint_gets_the_output_and_masks_each_position_behind_the_prompt() -> None:
    masks = CountingMasks()
    sampler = open_sampler(SequenceSampling(ANY, 2), VOCABULARY, masks)
    assert sampler is not None
    rows = append(sampler, [30, 31, 1, 2], 4)
    assert masks.asked == [([], [1, 2])]
    assert [allowed(row) for row in rows] == [list(range(VOCABULARY)), [1], [2], [3]]
    sampler.truncate(3)
    assert [allowed(row) for row in append(sampler, [5, 6], 1)] == [[0]]
    assert masks.asked[1:] == [([1, 5, 6], [])]


def test_a_constraint_and_allowed_tokens_hold_together() -> None:
    asked = SamplingParameters(constraint=ANY.constraint, allowed_token_ids=(2, 3))
    sampler = open_sampler(SequenceSampling(asked), VOCABULARY, CountingMasks())
    assert sampler is not None
    assert [allowed(row) for row in append(sampler, [1, 4], 2)] == [[2], []]


def test_targets_and_options_go_with_their_rows() -> None:
    options = LogprobsOptions(num_top=3)
    sampler = SequenceSampler(SequenceSampling(logprobs=options), VOCABULARY)
    rows = append(sampler, [1, 2, 3], 2, [3, NO_TOKEN])
    assert [(row.target, row.logprobs) for row in rows] == [(3, options), (NO_TOKEN, options)]


def test_plain_sequences_need_no_sampler() -> None:
    assert open_sampler(SequenceSampling(SamplingParameters(seed=5)), VOCABULARY) is None
    assert open_sampler(SequenceSampling(logprobs=LogprobsOptions()), VOCABULARY) is not None


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (SamplingParameters(logit_bias=((VOCABULARY, 1.0),)), "token id 40 is outside"),
        (SamplingParameters(bad_words=((1, 99),)), "token id 99"),
        (SamplingParameters(allowed_token_ids=(1, 50)), "token id 50"),
        (ANY, "no tokenizer to constrain"),
    ],
)
def test_what_a_model_cannot_do_is_refused(asked: SamplingParameters, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        open_sampler(SequenceSampling(asked), VOCABULARY)


@pytest.mark.parametrize("size", [-1, MAX_NGRAM_SIZE + 1])
def test_the_size_of_ngrams_has_a_bound(size: int) -> None:
    with pytest.raises(InvalidInputError, match="no_repeat_ngram_size"):
        SamplingParameters(no_repeat_ngram_size=size)


ONLY = SequenceSampling(SamplingParameters(allowed_token_ids=(33,), no_repeat_ngram_size=1), 2)


def test_outputs_end_before_a_position_where_nothing_is_allowed() -> None:
    sampler = SequenceSampler(ONLY, VOCABULARY)
    append(sampler, [1, 2, 33, 5], 3)
    assert sampler.outcome([33, NOTHING_ALLOWED, NOTHING_ALLOWED]) == [33]
    assert sampler.outcome([4, 5, 6]) == [4, 5, 6]


@pytest.mark.parametrize("outputs", [[NOTHING_ALLOWED], [7, NOTHING_ALLOWED]])
def test_an_output_that_begins_where_nothing_is_allowed_is_an_error(outputs: list[int]) -> None:
    sampler = SequenceSampler(ONLY, VOCABULARY)  # outputs of the prompt do not count
    append(sampler, [1, 2], len(outputs))
    found = sampler.outcome(outputs)
    assert isinstance(found, InvalidInputError)
    assert "no token at position 2" in str(found)


def test_a_draft_gives_a_token_all_the_same_the_forced_one_if_there_is_one() -> None:
    sampler = SequenceSampler(ONLY, VOCABULARY, is_draft=True)
    append(sampler, [1, 2], 1)
    assert sampler.outcome([NOTHING_ALLOWED]) == [33]
    free = SequenceSampler(SequenceSampling(SamplingParameters(top_k=2)), VOCABULARY, is_draft=True)
    append(free, [1, 2], 2)
    assert free.outcome([4, NOTHING_ALLOWED]) == [4, 0]
