"""Sampled sequences: each runner gives the tokens of the definition, in any passes."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from amusd.engine.interface import NO_TOKEN, EngineOptions, ScheduledSequence
from amusd.engine.loading.model_source import LoadedModel
from amusd.engine.model_engine import ModelEngine, serve
from amusd.engine.runners.padded import PaddedRunner
from amusd.engine.runners.ragged import RaggedRunner
from amusd.engine.runners.shape_buckets import Buckets
from amusd.engine.sampling.noise import gumbel_noise
from amusd.engine.sampling.reference_sampler import kept_scores
from amusd.engine.sampling.sampler import Sampler
from amusd.engine.sampling.sequence_sampler import Mask
from amusd.engine.sampling.token_edits import bitmask
from amusd.protocol.errors import InvalidInputError
from amusd.sampling.parameters import (
    Constraint,
    ConstraintKind,
    LogprobsOptions,
    SamplingParameters,
    SequenceSampling,
)
from tests import tiny
from tests.engine.row_engine import row_engine
from tests.engine.runners.test_rankings import DESCRIPTION, NUM_ROWS, RUNNERS, engine_of
from tests.engine.sampling.random_sampling import processed, samplings

CONTEXT, VOCABULARY = 60, tiny.VOCABULARY
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
NAMES = ["native", "ragged", "padded", "unbatched", "rope switching"]
HOT = SequenceSampling(SamplingParameters(temperature=1.0, seed=11), len(PROMPT))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    found = tiny.build("llama")
    torch.nn.Module.eval(found)
    return found


@pytest.fixture(scope="module")
def engines(model: PreTrainedModel) -> dict[str, ModelEngine]:
    sampler = Sampler(num_alternatives=2)
    return {name: engine_of(RUNNERS[name](model, sampler), 2) for name in NAMES}


def logits_of(model: PreTrainedModel, text: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    with torch.inference_mode():
        return np.asarray(model(torch.tensor([text])).logits[0, -1].numpy())


def by_definition(model: PreTrainedModel, sampling: SequenceSampling, num_tokens: int) -> list[int]:
    """Return the output behind PROMPT; it ends before a position where nothing is allowed."""
    text, asked = list(PROMPT), sampling.parameters
    for _ in range(num_tokens):
        logits = processed(logits_of(model, text), text, sampling)
        if not np.isfinite(logits).any():
            break
        scores = kept_scores(logits, asked)
        if not asked.is_greedy:
            scores = scores + gumbel_noise(asked.seed, len(text), np.arange(len(scores)))
        text.append(int(scores.argmax()))
    return text[len(PROMPT) :]


def tokens_of(
    engine: ModelEngine, sampling: SequenceSampling, expected: list[int], chance: random.Random
) -> list[int]:
    """Decode with proposals that are often right, beside other sequences; return the output."""
    slots = [engine.open(CONTEXT, sampling), engine.open(CONTEXT), engine.open(CONTEXT, HOT)]
    texts = [list(PROMPT) for _ in slots]
    try:
        cut = chance.randrange(1, len(PROMPT))
        engine.run([ScheduledSequence(slots[0], PROMPT[:cut], 0)])
        while len(texts[0]) < len(PROMPT) + len(expected):
            right = [*expected, 0, 0, 0, 0][len(texts[0]) - len(PROMPT) :][: chance.randint(0, 4)]
            proposed = [one if chance.random() < 0.8 else chance.randrange(200) for one in right]
            present = [0, *(at for at in (1, 2) if chance.random() < 0.5)]
            chance.shuffle(present)
            batch = []
            for at in present:
                tokens = [*texts[at][engine.length(slots[at]) :], *(proposed if at == 0 else ())]
                num_outputs = 1 if at else len(proposed) + 1
                batch.append(ScheduledSequence(slots[at], tokens, num_outputs))
            for at, outcome in zip(present, engine.run(batch), strict=True):
                texts[at].append(outcome[0])
                for token, following in zip(() if at else proposed, outcome[1:], strict=False):
                    if token != texts[0][-1]:
                        break
                    texts[0].append(following)
            engine.truncate(slots[0], len(texts[0]) - 1)
    finally:
        for slot in slots:
            engine.close(slot)
    return texts[0][len(PROMPT) :][: len(expected)]


@given(samplings(VOCABULARY, len(PROMPT)), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=15)
def test_every_runner_samples_the_same_in_any_passes(
    model: PreTrainedModel,
    engines: dict[str, ModelEngine],
    sampling: SequenceSampling,
    chance: random.Random,
) -> None:
    expected = by_definition(model, sampling, 8)
    for engine in engines.values():
        assert tokens_of(engine, sampling, expected, chance) == expected
        assert engine.num_open == 0


@pytest.mark.parametrize("name", NAMES)
def test_logprobs_are_those_of_the_outputs_or_of_the_targets(
    name: str, model: PreTrainedModel, engines: dict[str, ModelEngine]
) -> None:
    engine = engines[name]
    raw = torch.tensor(logits_of(model, PROMPT)).double().log_softmax(-1)
    cooled = torch.tensor(logits_of(model, PROMPT) / 0.5).double().log_softmax(-1)
    asked = SamplingParameters(temperature=0.5, seed=4)
    slots = [
        engine.open(CONTEXT, SequenceSampling(asked, 8, logprobs=LogprobsOptions(2, is_processed)))
        for is_processed in (False, True)
    ]
    plain = engine.open(CONTEXT)
    batch = [
        ScheduledSequence(slots[0], PROMPT, 2, targets=[77, NO_TOKEN]),
        ScheduledSequence(slots[1], PROMPT, 1),
        ScheduledSequence(plain, PROMPT, 1),
    ]
    [[_, token], [same], [largest]] = engine.run(batch)
    assert token == same
    assert largest == int(raw.argmax())
    first, second = engine.logprobs(slots[0])
    assert first.token == 77
    before = torch.tensor(logits_of(model, PROMPT[:-1])).double().log_softmax(-1)
    assert first.logprob == pytest.approx(float(before[77]), abs=1e-4)
    for found, expected in ((second, raw), (engine.logprobs(slots[1])[0], cooled)):
        best = expected.topk(2)
        assert found.token == token
        assert found.logprob == pytest.approx(float(expected[token]), abs=1e-4)
        assert [one for one, _ in found.top] == best.indices.tolist()
        assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert engine.logprobs(plain) == ()
    engine.run([ScheduledSequence(slots[0], [token], 0)])
    assert not engine.logprobs(slots[0])
    for slot in (*slots, plain):
        engine.close(slot)


@pytest.mark.parametrize("name", NAMES)
def test_a_request_that_allows_no_token_ends_alone(
    name: str, engines: dict[str, ModelEngine]
) -> None:
    engine = engines[name]
    bans = SamplingParameters(allowed_token_ids=(9,), no_repeat_ngram_size=1)
    bad, good = engine.open(CONTEXT, SequenceSampling(bans, 8)), engine.open(CONTEXT, HOT)
    batch = [ScheduledSequence(bad, PROMPT, 1), ScheduledSequence(good, PROMPT, 1)]
    outcome, [token] = engine.run(batch)
    assert isinstance(outcome, InvalidInputError)
    assert token >= 0
    engine.truncate(good, 0)
    assert engine.run(batch[1:]) == [[token]]
    for slot in (bad, good):
        engine.close(slot)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_before_a_broken_token_are_sampled_as_without_it(name: str) -> None:
    model = tiny.build("llama")
    embedding: Any = model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight[251] = float("nan")
    engine = engine_of(RUNNERS[name](model, Sampler()), 0)
    broken, whole = engine.open(CONTEXT, HOT), engine.open(CONTEXT, HOT)
    [expected] = engine.run([ScheduledSequence(whole, [*PROMPT, 7], 3)])
    batch = [ScheduledSequence(broken, [*PROMPT, 7, 251, 8], 5)]
    assert engine.run(batch) == [[*expected, NO_TOKEN, NO_TOKEN]]
    engine.truncate(broken, len(PROMPT))
    assert engine.run([ScheduledSequence(broken, [7], 1)]) == [expected[2:]]


def test_a_reused_prefix_counts_for_penalties(model: PreTrainedModel) -> None:
    engine = serve(LoadedModel(model, DESCRIPTION), EngineOptions(cache_mib=16))
    asked = SamplingParameters(repetition_penalty=1.9, no_repeat_ngram_size=1)
    prompt = list(range(VOCABULARY - 6))  # so that 6 tokens are left
    outputs = []
    for _ in range(2):
        slot = engine.open(len(prompt) + 10, SequenceSampling(asked, len(prompt)))
        num_cached = engine.reuse(slot, prompt)
        outputs.append(engine.run([ScheduledSequence(slot, prompt[num_cached:], 1)]))
        engine.close(slot)
    assert num_cached > 0
    assert outputs[0] == outputs[1]
    assert outputs[0][0][0] not in prompt


def test_greedy_sequences_alone_are_not_sampled_row_by_row(
    engines: dict[str, ModelEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines["ragged"]
    monkeypatch.setattr(RaggedRunner, "sample", lambda *_: pytest.fail("sampled"))
    slot = engine.open(CONTEXT, SequenceSampling(SamplingParameters(seed=9), 8))
    assert engine.run([ScheduledSequence(slot, PROMPT, 1)])
    engine.close(slot)


class OnlyToken:
    """Allows one token, whatever the output is."""

    def masks(self, output: Sequence[int], pending: Sequence[int]) -> list[Mask]:
        return [bitmask((42,), VOCABULARY)] * (len(pending) + 1)

    def prepare(self, constraint: Constraint) -> None:
        pass

    def state(self, constraint: Constraint) -> "OnlyToken":
        return self


def test_a_constraint_masks_the_logits(model: PreTrainedModel) -> None:
    asked = SamplingParameters(constraint=Constraint(ConstraintKind.REGEX, "a*"), temperature=1.0)
    sampling = SequenceSampling(asked, len(PROMPT))
    engine = serve(LoadedModel(model, DESCRIPTION), constraints=OnlyToken())
    slot = engine.open(CONTEXT, sampling)
    assert engine.run([ScheduledSequence(slot, [*PROMPT, 5], 2)]) == [[42, 42]]
    with pytest.raises(InvalidInputError, match="no tokenizer"):
        serve(LoadedModel(model, DESCRIPTION)).open(CONTEXT, sampling)


def test_a_draft_with_a_reduced_head_proposes_a_forced_token_that_it_lacks(
    model: PreTrainedModel,
) -> None:
    head_ids = torch.arange(0, VOCABULARY, 2)
    sampler = Sampler(head_ids, num_outputs=len(head_ids))
    asked = SequenceSampling(SamplingParameters(allowed_token_ids=(77,)), len(PROMPT))
    runner = RaggedRunner(model, sampler)
    draft = row_engine(DESCRIPTION, runner, 2, CONTEXT, is_draft=True)
    slot = draft.open(CONTEXT, asked)
    assert draft.run([ScheduledSequence(slot, PROMPT, 1)]) == [[77]]


def test_captured_passes_write_the_greedy_tokens_beside_sampled_batches(
    model: PreTrainedModel,
) -> None:
    runner = PaddedRunner(model, Buckets.fast(NUM_ROWS, CONTEXT), Sampler())
    engine = row_engine(DESCRIPTION, runner, NUM_ROWS, CONTEXT)
    greedy, hot = engine.open(CONTEXT), engine.open(CONTEXT, HOT)
    alone = engine.run([ScheduledSequence(greedy, PROMPT, 8)])
    engine.truncate(greedy, 0)
    both = [ScheduledSequence(hot, PROMPT, 1), ScheduledSequence(greedy, PROMPT, 8)]
    assert engine.run(both)[1] == alone[0]
