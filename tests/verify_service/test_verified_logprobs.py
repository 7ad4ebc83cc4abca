"""Sampling and log-probabilities in a verify service: openings, verdicts, chunks of a prompt."""

from dataclasses import replace

import pytest

from amusd.engine.interface import NO_TOKEN
from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from amusd.fleet.model_description import ServiceLimits
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.events import Forward, Verdict
from amusd.sampling.parameters import (
    GREEDY,
    LogprobsOptions,
    SamplingParameters,
    SequenceSampling,
    TokenLogprobs,
)
from tests.serving.sampling_engine import SamplingEngine, logprobs_at
from verify_service.verifying import VerifyOpening, VerifyWorker

MODEL = SyntheticModel(vocabulary=50, batch=4)
LIMITS = ServiceLimits(max_sessions=4, max_context=400, max_lookahead=4, max_waiting=2)
PROMPT = [1, 2, 3, 4, 5]
SAMPLING = SequenceSampling(SamplingParameters(logit_bias=((49, -0.5),)), len(PROMPT))
WITH_LOGPROBS = replace(SAMPLING, logprobs=LogprobsOptions(1))
WITH_PROMPT = replace(SAMPLING, logprobs=LogprobsOptions(1, has_prompt=True))


class Bench:
    """A verify worker, its engine, and the verdicts of its sessions."""

    def __init__(
        self,
        prefill_budget: int = 1000,
        model: SyntheticModel = MODEL,
        engine: SyntheticEngine | None = None,
    ) -> None:
        self.engine = SamplingEngine(model)
        self.worker = VerifyWorker(engine or self.engine, LIMITS, prefill_budget)
        self.verdicts: list[Verdict] = []

    def open(self, sampling: SequenceSampling, tokens: list[int] = PROMPT, name: str = "a") -> None:
        opening = VerifyOpening(name, list(tokens), len(tokens) + 20, sampling=sampling)
        self.worker.open(opening, self._take)

    def run(self) -> list[Verdict]:
        while self.worker.step():
            pass
        return self.verdicts

    def _take(self, message: object) -> None:
        assert isinstance(message, Verdict), message
        self.verdicts.append(message)


def written(tokens: list[int], num_tokens: int) -> list[int]:
    text = list(tokens)
    for _ in range(num_tokens):
        text.append(MODEL.next_token(text))
    return text[len(tokens) :]


def at(position: int, *tokens: int) -> tuple[TokenLogprobs, ...]:
    return tuple(logprobs_at(index, token) for index, token in enumerate(tokens, position))


def test_a_session_is_opened_with_its_sampling() -> None:
    bench = Bench()
    bench.open(SAMPLING)
    bench.open(GREEDY, name="b")
    assert bench.engine.opened == [SAMPLING, GREEDY]


def test_a_session_that_waited_for_memory_is_opened_with_its_sampling() -> None:
    bench = Bench(model=replace(MODEL, memory=30))
    bench.open(GREEDY)
    bench.open(SAMPLING, name="b")
    bench.worker.close("a")
    assert bench.engine.opened == [GREEDY, SAMPLING]


def test_token_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="banned_token_ids: token id 50 is outside"):
        Bench().open(replace(SAMPLING, banned_token_ids=(50,), min_position=9))


def test_verdicts_have_no_log_probabilities_unless_they_are_asked_for() -> None:
    bench = Bench()
    bench.open(SAMPLING)
    [verdict] = bench.run()
    assert (verdict.logprobs, verdict.prompt_logprobs) == ((), ())


def test_a_verdict_has_the_log_probabilities_of_each_token_that_became_final() -> None:
    bench = Bench()
    bench.open(WITH_LOGPROBS)
    first, second, third, fourth = written(PROMPT, 4)
    bench.worker.receive("a", Forward(0, 5, (first, second, (third + 1) % 50, fourth)))
    [verdict] = bench.run()
    assert (verdict.num_accepted, verdict.next_token) == (2, third)
    assert verdict.logprobs == at(5, first, second, third)
    bench.worker.receive("a", Forward(1, 8, ()))
    assert bench.run()[-1].logprobs == at(8, fourth)
    assert all(one.prompt_logprobs == () for one in bench.verdicts)


@pytest.mark.parametrize("prefill_budget", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("num_proposed", [0, 2])
def test_the_first_verdict_has_those_of_the_prompt(prefill_budget: int, num_proposed: int) -> None:
    bench = Bench(prefill_budget)
    bench.open(WITH_PROMPT)
    own = written(PROMPT, 4)
    if num_proposed:
        bench.worker.receive("a", Forward(0, 5, (own[0], (own[1] + 1) % 50)))
    [verdict] = bench.run()
    assert verdict.prompt_logprobs == at(1, *PROMPT[1:])
    assert verdict.logprobs == at(5, *own[: 2 if num_proposed else 1])
    bench.worker.receive("a", Forward(verdict.epoch + bool(num_proposed), 9, ()))
    assert bench.run()[-1].prompt_logprobs == ()


def test_the_prompt_of_one_token_has_none() -> None:
    bench = Bench()
    bench.open(replace(WITH_PROMPT, num_prompt_tokens=1), [9])
    [verdict] = bench.run()
    assert verdict.prompt_logprobs == ()
    assert verdict.logprobs == at(1, *written([9], 1))


def test_a_rebuilt_session_gets_those_of_its_prompt_alone() -> None:
    bench = Bench()
    bench.open(replace(WITH_PROMPT, num_prompt_tokens=3))
    assert bench.run()[0].prompt_logprobs == at(1, *PROMPT[1:3])


def test_a_prompt_with_log_probabilities_is_computed_whole_in_bounded_chunks() -> None:
    long = [token % 50 for token in range(300)]
    bench = Bench()
    bench.open(GREEDY, long, "first")
    bench.run()
    bench.engine.scheduled.clear()
    bench.open(replace(WITH_PROMPT, num_prompt_tokens=300), long, "second")
    verdict = bench.run()[-1]
    assert [len(one.tokens) for one in bench.engine.scheduled] == [128, 128, 44]
    assert all(one.num_outputs == len(one.targets) for one in bench.engine.scheduled)
    assert bench.engine.scheduled[-1].targets[-1] == NO_TOKEN
    assert verdict.num_cached == 0
    assert len(verdict.prompt_logprobs) == 299


def test_other_sessions_reuse_the_prompt_of_one_with_log_probabilities() -> None:
    long = [token % 50 for token in range(200)]
    bench = Bench()
    bench.open(replace(WITH_PROMPT, num_prompt_tokens=200), long, "first")
    bench.run()
    bench.open(GREEDY, long, "second")
    assert bench.run()[-1].num_cached > 100


@pytest.mark.parametrize("is_processed", [False, True])
def test_log_probabilities_are_the_same_with_and_without_proposals(is_processed: bool) -> None:
    sampling = SequenceSampling(
        SamplingParameters(temperature=1.0, top_k=20, seed=11),
        len(PROMPT),
        logprobs=LogprobsOptions(3, is_processed, has_prompt=True),
    )
    plain = Bench(engine=SyntheticEngine(MODEL))
    plain.open(sampling)
    plain.worker.receive("a", Forward(0, 16, ()))
    expected = plain.run()
    output = [one.next_token for one in expected]
    proposing = Bench(prefill_budget=2, engine=SyntheticEngine(MODEL))
    proposing.open(sampling)
    proposing.worker.receive("a", Forward(0, 5, (*output[:2], (output[2] + 1) % 50)))
    proposing.run()
    proposing.worker.receive("a", Forward(1, 8, tuple(output[3:7])))
    found = proposing.run()
    assert [one.num_accepted for one in found] == [2, 4]
    assert found[0].prompt_logprobs == expected[0].prompt_logprobs
    assert len(found[0].prompt_logprobs) == len(PROMPT) - 1
    logprobs = [one for verdict in found for one in verdict.logprobs]
    assert logprobs == [one for verdict in expected[:8] for one in verdict.logprobs]
    assert [one.token for one in logprobs] == output[:8]
