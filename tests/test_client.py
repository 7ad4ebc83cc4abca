"""The Python client, without a server: requests, streamed responses, and errors."""

from collections.abc import Iterator

import pytest

from amusd.client import Client, Generation, Options
from amusd.clients.connection import Connection
from amusd.clients.request_building import generate_request
from amusd.prompts import Prompt
from amusd.protocol.errors import InvalidInputError, PreconditionError, UnavailableError
from amusd.protocol.finish import FinishReason
from amusd.protocol.strategy import Strategy
from amusd.v1 import orchestrator_pb2 as pb

NOWHERE = Connection("nowhere:1")


def test_unset_options_are_left_to_the_server() -> None:
    request = generate_request(Prompt(text="hi"), Options())
    assert request == pb.GenerateRequest(text="hi")
    assert not request.HasField("max_tokens")
    assert not request.HasField("lookahead")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (Prompt(text="é☕"), pb.GenerateRequest(text="é☕")),
        (Prompt(tokens=(1, 2)), pb.GenerateRequest(tokens=pb.TokenIds(ids=[1, 2]))),
        (
            Prompt.chat("hi"),
            pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])),
        ),
    ],
)
def test_each_kind_of_prompt_has_its_field(prompt: Prompt, expected: pb.GenerateRequest) -> None:
    assert generate_request(prompt, Options()) == expected


def test_all_options_are_sent_even_zeros() -> None:
    options = Options(Strategy.SPECULATIVE, 0, 0, (5,), ignore_eos=True)
    request = generate_request(Prompt(text="hi"), options)
    assert request.strategy == pb.STRATEGY_SPECULATIVE
    assert request.HasField("max_tokens")
    assert request.HasField("lookahead")
    assert list(request.stop_token_ids) == [5]
    assert request.ignore_eos


@pytest.mark.parametrize("prompt", [Prompt(text="a\ud800"), Prompt.chat("a\ud800")])
def test_a_lone_surrogate_is_an_invalid_input(prompt: Prompt) -> None:
    with pytest.raises(InvalidInputError, match="character 1"):
        generate_request(prompt, Options())


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (
            Prompt(text="a"),
            Options(max_tokens=2**31),
            "is 2147483648: a request holds 0 to 2147483647",
        ),
        (Prompt(text="a"), Options(max_tokens=-1), "max_tokens is -1: a request holds"),
        (Prompt(text="a"), Options(lookahead=-1), "lookahead is -1: a request holds 0 to"),
        (
            Prompt(text="a"),
            Options(stop_token_ids=(1, 2**32)),
            "stop token is 4294967296: a request",
        ),
        (Prompt(tokens=(1, -1)), Options(), "token is -1: a request holds 0 to 4294967295"),
    ],
)
def test_a_number_that_no_field_holds_is_an_invalid_input(
    prompt: Prompt, options: Options, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        generate_request(prompt, options)


class Call:
    """A call whose responses are there already."""

    def __init__(self, num_responses: int = 3) -> None:
        statistics = pb.Statistics(num_output_tokens=3, num_passes=2)
        completion = pb.Completion(
            finish_reason=pb.FINISH_REASON_STOP, text="\ufffd", statistics=statistics
        )
        self._responses = [
            pb.GenerateResponse(chunk=pb.Chunk(token_ids=[1, 2], text="ab")),
            pb.GenerateResponse(chunk=pb.Chunk(token_ids=[3])),
            pb.GenerateResponse(completion=completion),
        ][:num_responses]
        self.num_cancelled = 0

    def __iter__(self) -> Iterator[pb.GenerateResponse]:
        return iter(self._responses)

    def cancel(self) -> None:
        self.num_cancelled += 1


def test_a_generation_yields_its_pieces_and_keeps_them() -> None:
    generation = Generation(Call(), NOWHERE)
    pieces = list(generation)
    assert pieces == ["ab", "", "\ufffd"]
    assert [piece.tokens for piece in pieces] == [(1, 2), (3,), ()]
    assert [piece.text for piece in pieces] == ["ab", "", "\ufffd"]
    assert generation.tokens == [1, 2, 3]
    assert generation.text == "ab\ufffd"
    assert generation.finish_reason is FinishReason.STOP
    assert generation.summary().num_output_tokens == 3


def test_an_output_without_a_completion_has_no_statistics() -> None:
    generation = Generation(Call(num_responses=2), NOWHERE).wait()
    with pytest.raises(UnavailableError, match="no completion: read it to its end"):
        generation.summary()


def test_leaving_a_loop_cancels_the_call_and_keeps_what_was_read() -> None:
    call = Call()
    generation = Generation(call, NOWHERE)
    for _ in generation:
        assert call.num_cancelled == 0
        break
    assert call.num_cancelled > 0
    assert generation.tokens == [1, 2]
    assert list(generation) == []  # it has ended


def test_a_closed_client_says_so() -> None:
    client = Client("127.0.0.1:9")
    client.close()
    for attempt in (client.server_info, lambda: client.generate(Prompt(text="hi"))):
        with pytest.raises(PreconditionError, match="the client is closed: make a new one"):
            attempt()


def test_the_error_of_an_unreachable_server_names_it_in_one_line() -> None:
    # Nothing listens on the discard port.
    with Client("127.0.0.1:9", timeout_seconds=5) as client:
        for attempt in (client.server_info, client.generate(Prompt(text="hi")).wait):
            with pytest.raises(UnavailableError, match=r"orchestrator at 127\.0\.0\.1:9") as caught:
                attempt()
            assert "\n" not in str(caught.value)
