"""Sampled sequences of synthetic models: the same tokens with a draft, real variety, refusals."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amusd.engine.interface import EngineOptions, ScheduledSequence
from amusd.engine.no_model import NoModel
from amusd.engine.reference import decode_autoregressive, decode_speculative
from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from amusd.protocol.errors import InvalidInputError
from amusd.sampling.parameters import (
    Constraint,
    ConstraintKind,
    LogprobsOptions,
    SamplingParameters,
    SequenceSampling,
)
from tests.engine.sampling.random_sampling import samplings

PROMPT = [1, 2, 3]
HOT = SamplingParameters(temperature=1.0, seed=7)


@given(samplings(50, len(PROMPT)))
@settings(deadline=None, max_examples=40)
def test_sampled_decoding_is_the_same_with_and_without_a_draft(sampling: SequenceSampling) -> None:
    verify = SyntheticEngine(SyntheticModel(vocabulary=50))
    draft = SyntheticEngine(
        SyntheticModel(vocabulary=50, agreement=0.7), options=EngineOptions(is_draft=True)
    )
    try:
        expected = decode_autoregressive(verify, PROMPT, 12, sampling)
    except InvalidInputError:  # the random bans leave no token
        with pytest.raises(InvalidInputError):
            decode_speculative(draft, verify, PROMPT, 12, 3, sampling)
    else:
        assert decode_speculative(draft, verify, PROMPT, 12, 3, sampling) == expected
    assert draft.num_open == verify.num_open == 0


@given(st.lists(st.integers(0, 255), max_size=5), st.integers(0, 3))
def test_the_greedy_token_has_the_largest_logit(text: list[int], seed: int) -> None:
    for agreement in (1.0, 0.5):
        model = SyntheticModel(seed=seed, agreement=agreement)
        logits = model.logits(text)
        assert int(logits.argmax()) == model.next_token(text)
        assert (logits == logits.max()).sum() == 1


def test_a_draft_has_the_logits_of_the_verify_model_where_it_agrees() -> None:
    verify, draft = SyntheticModel(), SyntheticModel(agreement=0.5)
    for token in range(50):
        ours, theirs = draft.logits([token]), verify.logits([token])
        if draft.next_token([token]) == verify.next_token([token]):
            assert np.array_equal(ours, theirs)
        else:
            assert (ours != theirs).sum() == 2


def test_a_temperature_of_one_gives_variety_and_a_seed_the_same_text() -> None:
    engine = SyntheticEngine(SyntheticModel())
    texts = [
        decode_autoregressive(engine, PROMPT, 20, SequenceSampling(replace(HOT, seed=seed)))
        for seed in (1, 2, 1)
    ]
    assert texts[0] == texts[2]
    assert texts[0] != texts[1]
    greedy = decode_autoregressive(engine, PROMPT, 20)
    assert texts[0] != greedy


def test_sampled_sequences_have_logprobs_and_alternatives() -> None:
    model = SyntheticModel(alternatives=2)
    engine = SyntheticEngine(model)
    sampling = SequenceSampling(HOT, len(PROMPT), logprobs=LogprobsOptions(num_top=3))
    slot, plain = engine.open(20, sampling), engine.open(20)
    assert engine.alternatives(slot) == engine.probabilities(slot) == ()
    batch = [ScheduledSequence(slot, PROMPT, 1), ScheduledSequence(plain, PROMPT, 1)]
    [[token], [largest]] = engine.run(batch)
    [found] = engine.logprobs(slot)
    logits = model.logits(PROMPT).astype(np.float64)
    assert found.token == token
    assert found.logprob == pytest.approx(logits[token] - np.log(np.exp(logits).sum()))
    assert found.top[0][0] == largest
    assert len({token, *engine.alternatives(slot)}) == len(engine.probabilities(slot)) == 3
    assert not engine.logprobs(plain)
    engine.close(slot)
    assert not engine.logprobs(slot)


def test_a_constraint_is_refused_without_a_tokenizer() -> None:
    asked = SamplingParameters(constraint=Constraint(ConstraintKind.JSON_OBJECT))
    with pytest.raises(InvalidInputError, match="no tokenizer"):
        SyntheticEngine(SyntheticModel()).open(10, SequenceSampling(asked))


def test_without_a_model_any_sampling_is_accepted() -> None:
    asked = SamplingParameters(constraint=Constraint(ConstraintKind.JSON_OBJECT), top_k=3)
    engine = NoModel(EngineOptions(cache_mib=1, index_bytes=8))
    slot = engine.open(10, SequenceSampling(asked))
    assert not engine.logprobs(slot)
