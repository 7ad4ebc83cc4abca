"""Requests that the orchestrator refuses: the status, one line of advice, and no harm done."""

import grpc
import pytest

from amusd.client import Client, Options
from amusd.prompts import Prompt
from amusd.v1 import orchestrator_pb2 as pb
from amusd.v1 import orchestrator_pb2_grpc as rpc
from amusd.v1 import sampling_pb2
from amusd.v1.sampling_pb2 import Sampling
from tests.process.services import Trio

pytestmark = pytest.mark.process

INVALID = grpc.StatusCode.INVALID_ARGUMENT
ONE = pb.TokenIds(ids=[1])

CASES = {
    "no prompt": (pb.GenerateRequest(), INVALID, "set text, chat or tokens"),
    "empty text": (pb.GenerateRequest(text=""), INVALID, "prompt"),
    "no message": (pb.GenerateRequest(chat=pb.Chat()), INVALID, "at least one"),
    "empty message": (
        pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user")])),
        INVALID,
        "give each one content",
    ),
    "no tokens": (pb.GenerateRequest(tokens=pb.TokenIds()), INVALID, "at least one"),
    "a token outside the vocabulary": (
        pb.GenerateRequest(tokens=pb.TokenIds(ids=[512])),
        INVALID,
        "outside the vocabulary of 512",
    ),
    "the largest token id there is": (
        pb.GenerateRequest(tokens=pb.TokenIds(ids=[2**32 - 1])),
        INVALID,
        "outside the vocabulary of 512",
    ),
    "a stop token outside the vocabulary": (
        pb.GenerateRequest(tokens=ONE, stop_token_ids=[9999]),
        INVALID,
        "outside the vocabulary",
    ),
    "a prompt over the context": (
        pb.GenerateRequest(tokens=pb.TokenIds(ids=[1] * 600)),
        INVALID,
        "shorten the prompt",
    ),
    "prompt and output over the context": (
        pb.GenerateRequest(tokens=pb.TokenIds(ids=[1] * 500), max_tokens=101),
        INVALID,
        "ask for max_tokens of 100 or less",
    ),
    "max_tokens of zero": (pb.GenerateRequest(tokens=ONE, max_tokens=0), INVALID, "1 or more"),
    "negative max_tokens": (pb.GenerateRequest(tokens=ONE, max_tokens=-5), INVALID, "1 or more"),
    "an unknown strategy": (
        pb.GenerateRequest(tokens=ONE, strategy=17),  # type: ignore[arg-type]
        INVALID,
        "STRATEGY_AMUSD",
    ),
    "a look-ahead of zero": (pb.GenerateRequest(tokens=ONE, lookahead=0), INVALID, "1 to 16"),
    "too much look-ahead": (pb.GenerateRequest(tokens=ONE, lookahead=17), INVALID, "1 to 16"),
    "more max_tokens than there can be": (
        pb.GenerateRequest(tokens=ONE, max_tokens=2**31 - 1),
        INVALID,
        "ask for max_tokens of 599 or less",
    ),
    "the largest look-ahead there is": (
        pb.GenerateRequest(tokens=ONE, lookahead=2**32 - 1),
        INVALID,
        "1 to 16",
    ),
    "a request over the size of a message": (
        pb.GenerateRequest(text="x" * 5_000_000),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "larger than max",
    ),
    "a negative temperature": (
        pb.GenerateRequest(tokens=ONE, sampling=Sampling(temperature=-1.0)),
        INVALID,
        "temperature is -1: use 0 or 0.01 to 100",
    ),
    "a temperature that is no number": (
        pb.GenerateRequest(tokens=ONE, sampling=Sampling(temperature=float("nan"))),
        INVALID,
        "temperature is nan",
    ),
    "an infinite bias": (
        pb.GenerateRequest(tokens=ONE, sampling=Sampling(logit_bias={1: float("inf")})),
        INVALID,
        "logit_bias of token 1 is inf: use -100 to 100",
    ),
    "a bias outside the vocabulary": (
        pb.GenerateRequest(tokens=ONE, sampling=Sampling(logit_bias={512: 1.0})),
        INVALID,
        "logit_bias: token id 512 is outside the vocabulary of 512",
    ),
    "a top_p of zero": (
        pb.GenerateRequest(tokens=ONE, sampling=Sampling(top_p=0.0)),
        INVALID,
        "top_p is 0: use a number above 0",
    ),
    "more tokens at least than at most": (
        pb.GenerateRequest(tokens=ONE, max_tokens=4, min_tokens=5),
        INVALID,
        "min_tokens is 5",
    ),
    "a constraint without a form": (
        pb.GenerateRequest(tokens=ONE, sampling=Sampling(constraint=sampling_pb2.Constraint())),
        INVALID,
        "set one of json_schema",
    ),
    "a constraint that cannot end the output": (
        pb.GenerateRequest(
            tokens=ONE,
            sampling=Sampling(constraint=sampling_pb2.Constraint(json_object=True)),
            ignore_eos=True,
        ),
        INVALID,
        "ignore_eos contradicts the constraint",
    ),
    "too many likeliest tokens": (
        pb.GenerateRequest(tokens=ONE, logprobs=sampling_pb2.LogprobsOptions(num_top=21)),
        INVALID,
        "num_top is 21: use 0 to 20",
    ),
    "chat for a model without a template": (
        pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])),
        grpc.StatusCode.UNIMPLEMENTED,
        "send the prompt as text",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_request_gets_its_status_and_says_what_to_do(
    trio: Trio, client: Client, case: str
) -> None:
    request, status, message = CASES[case]
    with trio.orchestrator.channel() as channel, pytest.raises(grpc.RpcError) as caught:
        list(rpc.OrchestratorServiceStub(channel).Generate(request, timeout=20))
    assert caught.value.code() is status
    details = str(caught.value.details())
    assert message in details
    assert "\n" not in details
    assert client.generate(Prompt(tokens=(1,)), Options(max_tokens=3)).wait().tokens


def test_a_temperature_of_zero_is_greedy(trio: Trio) -> None:
    request = pb.GenerateRequest(tokens=ONE, max_tokens=4, sampling=Sampling(temperature=0.0))
    with trio.orchestrator.channel() as channel:
        responses = list(rpc.OrchestratorServiceStub(channel).Generate(request, timeout=20))
    assert responses[-1].completion.statistics.num_output_tokens == 4
