"""From requests to sampling: defaults, seeds, minimum lengths, and what contradicts itself."""

from dataclasses import replace
from typing import Any

import pytest

from amusd.protocol.errors import InvalidInputError
from amusd.rpc.channel import MAX_MESSAGE_BYTES
from amusd.rpc.sampling_codec import logprobs_to_proto
from amusd.sampling.parameters import LogprobsOptions, SequenceSampling, TokenLogprobs
from amusd.v1 import sampling_pb2, verify_pb2
from amusd.v1.orchestrator_pb2 import GenerateRequest
from amusd.v1.sampling_pb2 import Constraint, Sampling
from orchestrator.request_sampling import MAX_PROMPT_LOGPROBS, sampling_of
from tests.orchestrator.replicas import MODEL

NUM_PROMPT = 4
MAX_TOKENS = 10
WITH_END = replace(MODEL, eos_token_ids=(2, 3))
JSON = Constraint(json_object=True)


def sampling(num_prompt: int = NUM_PROMPT, **fields: Any) -> SequenceSampling:
    return sampling_of(GenerateRequest(**fields), WITH_END, num_prompt, MAX_TOKENS)


def test_a_request_that_asks_for_nothing_is_greedy() -> None:
    assert sampling() == SequenceSampling(num_prompt_tokens=NUM_PROMPT)
    assert sampling().is_plain


def test_a_seed_is_kept_and_a_missing_one_is_random() -> None:
    assert sampling(sampling=Sampling(temperature=1.0, seed=0)).parameters.seed == 0
    seeds = {sampling(sampling=Sampling(temperature=1.0)).parameters.seed for _ in range(20)}
    assert len(seeds) == 20
    assert max(seeds) > 2**32


@pytest.mark.parametrize(
    ("fields", "banned"),
    [({}, (2, 3)), ({"stop_token_ids": [9, 2]}, (2, 3, 9)), ({"ignore_eos": True}, ())],
)
def test_before_min_tokens_all_tokens_that_end_the_output_are_banned(
    fields: dict[str, Any], banned: tuple[int, ...]
) -> None:
    found = sampling(min_tokens=3, **fields)
    assert found.banned_token_ids == banned
    assert found.min_position == (NUM_PROMPT + 3 if banned else 0)


def test_log_probabilities_are_those_that_are_asked_for() -> None:
    options = sampling_pb2.LogprobsOptions(num_top=5, has_prompt=True)
    assert sampling(logprobs=options).logprobs == LogprobsOptions(5, has_prompt=True)
    assert sampling(logprobs=sampling_pb2.LogprobsOptions()).logprobs == LogprobsOptions()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "more tokens at least than at most": (
        {"min_tokens": 11},
        "min_tokens is 11: ask for max_tokens or less, which is 10",
    ),
    "a constraint beside ignore_eos": (
        {"sampling": Sampling(constraint=JSON), "ignore_eos": True},
        "ignore_eos contradicts the constraint",
    ),
    "a constraint beside min_tokens": (
        {"sampling": Sampling(constraint=JSON), "min_tokens": 1},
        "min_tokens contradicts the constraint",
    ),
    "a constraint beside allowed tokens": (
        {"sampling": Sampling(constraint=JSON, allowed_token_ids=[1])},
        "allowed_token_ids contradicts the constraint",
    ),
    "a bias outside the vocabulary": (
        {"sampling": Sampling(logit_bias={50: 1.0})},
        "logit_bias: token id 50 is outside the vocabulary of 50 tokens",
    ),
    "an allowed token outside the vocabulary": (
        {"sampling": Sampling(allowed_token_ids=[2**32 - 1])},
        "allowed_token_ids: token id 4294967295 is outside",
    ),
    "a bad word outside the vocabulary": (
        {"sampling": Sampling(bad_words=[sampling_pb2.TokenSequence(ids=[1, 99])])},
        "bad_words: token id 99 is outside",
    ),
    "bans of all that is allowed": (
        {
            "sampling": Sampling(
                allowed_token_ids=[2, 7], bad_words=[sampling_pb2.TokenSequence(ids=[7])]
            ),
            "min_tokens": 1,
        },
        "ban all tokens of allowed_token_ids",
    ),
    "bans of the whole vocabulary": (
        {
            "sampling": Sampling(
                bad_words=[sampling_pb2.TokenSequence(ids=[token]) for token in range(50)]
            )
        },
        "ban all tokens of the vocabulary",
    ),
    "too many likeliest tokens": (
        {"logprobs": sampling_pb2.LogprobsOptions(num_top=21)},
        "num_top is 21: use 0 to 20",
    ),
    "a number that is none": ({"sampling": Sampling(min_p=float("nan"))}, "min_p is nan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_request_that_cannot_be_obeyed_is_refused_by_the_name_of_a_field(case: str) -> None:
    fields, words = REFUSED[case]
    with pytest.raises(InvalidInputError) as caught:
        sampling(**fields)
    assert words in str(caught.value)


def test_allowed_tokens_need_no_end_of_text() -> None:
    assert sampling(sampling=Sampling(allowed_token_ids=[7])).parameters.allowed_token_ids == (7,)


@pytest.mark.parametrize("num_top", [0, 20])
def test_the_log_probabilities_of_a_prompt_fit_into_a_message(num_top: int) -> None:
    most = MAX_PROMPT_LOGPROBS // (num_top + 1)
    options = sampling_pb2.LogprobsOptions(num_top=num_top, has_prompt=True)
    assert sampling(most, logprobs=options).logprobs is not None
    with pytest.raises(InvalidInputError, match=r"logprobs.has_prompt asks for .*shorten"):
        sampling(most + 1, logprobs=options)
    one = TokenLogprobs(1 << 17, -1.0, ((1 << 17, -1.0),) * num_top)
    verdict = verify_pb2.Verdict(prompt_logprobs=logprobs_to_proto([one] * most))
    assert verdict.ByteSize() < MAX_MESSAGE_BYTES / 2
