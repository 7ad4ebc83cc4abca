"""Sampling and log-probabilities in a session: what its opens carry, here and on a new replica."""

from dataclasses import replace

import grpc
import pytest

from amusd.protocol.events import Verdict
from amusd.protocol.finish import FinishRule
from amusd.protocol.strategy import Strategy
from amusd.rpc.sampling_codec import sequence_sampling_from_proto
from amusd.sampling.parameters import (
    Constraint,
    ConstraintKind,
    LogprobsOptions,
    SamplingParameters,
    SequenceSampling,
)
from orchestrator.emission import Emission
from orchestrator.session_plan import SessionPlan
from tests.orchestrator.replicas import FakeDraft, FakeVerify, becomes_true, logprobs_of, written
from tests.orchestrator.running_backends import Serve, run_session, running

PROMPT = (1, 2, 3)
NUM_TOKENS = 12
OUTPUT = written(list(PROMPT), NUM_TOKENS)
SAMPLING = SequenceSampling(
    SamplingParameters(
        temperature=0.5,
        top_k=4,
        logit_bias=((3, 0.5), (7, -0.5)),
        bad_words=((1, 2), (3,)),
        seed=2**64 - 1,
        constraint=Constraint(ConstraintKind.REGEX, "a+"),
    ),
    num_prompt_tokens=len(PROMPT),
    min_position=5,
    banned_token_ids=(0, 9),
    logprobs=LogprobsOptions(2, has_prompt=True),
)


def plan_with(
    sampling: SequenceSampling, strategy: Strategy, *stops: int, num_tokens: int = NUM_TOKENS
) -> SessionPlan:
    return SessionPlan(
        "sampled",
        PROMPT,
        strategy,
        4,
        FinishRule(num_tokens, frozenset(stops)),
        verify_timeout_seconds=10.0,
        draft_timeout_seconds=5.0,
        sampling=sampling,
    )


def check(emissions: list[Emission], num_tokens: int = NUM_TOKENS) -> None:
    """Check that each token came once, with its own log-probability."""
    tokens = [token for one in emissions for token in one.tokens]
    assert tokens == OUTPUT[:num_tokens]
    found = tuple(logprobs for one in emissions for logprobs in one.logprobs)
    assert found == logprobs_of([*PROMPT, *tokens], len(PROMPT))
    assert all(len(one.logprobs) == len(one.tokens) for one in emissions)
    prompt = tuple(logprobs for one in emissions for logprobs in one.prompt_logprobs)
    assert prompt == logprobs_of(list(PROMPT), 1)
    assert emissions[0].prompt_logprobs == prompt


@pytest.mark.parametrize("strategy", [Strategy.SPECULATIVE, Strategy.AMUSD])
async def test_both_services_get_the_sampling_and_the_draft_no_log_probabilities(
    serve: Serve, strategy: Strategy
) -> None:
    verify, draft = FakeVerify(), FakeDraft(num_proposed=5)
    async with running(await serve(verify), await serve(draft)) as backends:
        await backends.connect(10)
        _, emissions = await run_session(backends, plan_with(SAMPLING, strategy))
    check(emissions)
    assert sequence_sampling_from_proto(verify.opened[0]) == SAMPLING
    assert sequence_sampling_from_proto(draft.opened[0]) == replace(SAMPLING, logprobs=None)


@pytest.mark.parametrize("num_passes", [0, 1, 3])
async def test_another_replica_goes_on_with_the_same_sampling(
    serve: Serve, num_passes: int
) -> None:
    failing = FakeVerify(num_free_passes=num_passes, failure=grpc.StatusCode.INTERNAL)
    other = FakeVerify(num_sessions=9)
    addresses = ",".join([await serve(failing), await serve(other)])
    async with running(addresses) as backends:
        await becomes_true(lambda: len(backends.verify.usable) == 2)
        _, emissions = await run_session(backends, plan_with(SAMPLING, Strategy.AUTOREGRESSIVE))
    check(emissions)
    [opening] = other.opened
    assert len(opening.token_ids) == len(PROMPT) + num_passes
    found = sequence_sampling_from_proto(opening)
    assert found.num_prompt_tokens == len(PROMPT)
    logprobs = LogprobsOptions(2, has_prompt=num_passes == 0)
    assert found == replace(SAMPLING, logprobs=logprobs)


@pytest.mark.parametrize("strategy", Strategy)
@pytest.mark.parametrize("num_tokens", [1, 3])
async def test_tokens_behind_the_end_of_the_output_have_no_log_probabilities(
    serve: Serve, strategy: Strategy, num_tokens: int
) -> None:
    stop = OUTPUT[num_tokens - 1]
    assert stop not in OUTPUT[: num_tokens - 1]
    draft = FakeDraft(num_proposed=9)
    async with running(await serve(FakeVerify()), await serve(draft)) as backends:
        await backends.connect(10)
        _, by_stop = await run_session(backends, plan_with(SAMPLING, strategy, stop))
        _, by_length = await run_session(
            backends, plan_with(SAMPLING, strategy, num_tokens=num_tokens)
        )
    check(by_stop, num_tokens)
    check(by_length, num_tokens)


async def test_a_session_that_asks_for_nothing_gets_no_log_probabilities(serve: Serve) -> None:
    verify = FakeVerify()
    async with running(await serve(verify)) as backends:
        await backends.connect(10)
        plan = plan_with(replace(SAMPLING, logprobs=None), Strategy.AUTOREGRESSIVE)
        _, emissions = await run_session(backends, plan)
    assert emissions == [Emission((token,)) for token in OUTPUT]
    assert not verify.opened[0].HasField("logprobs")


async def test_a_timeline_keeps_no_log_probabilities(serve: Serve) -> None:
    async with running(await serve(FakeVerify())) as backends:
        await backends.connect(10)
        plan = replace(plan_with(SAMPLING, Strategy.AUTOREGRESSIVE), records_timeline=True)
        outcome, _ = await run_session(backends, plan)
    assert outcome.timeline is not None
    verdicts = [one.message for one in outcome.timeline.events if isinstance(one.message, Verdict)]
    assert len(verdicts) == NUM_TOKENS
    assert all(one.logprobs == one.prompt_logprobs == () for one in verdicts)
