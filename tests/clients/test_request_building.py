"""Requests of the Python client, as pure functions: every prompt, every option, every refusal."""

import dataclasses
import json
import math
import typing
from typing import Any

import pytest

from amusd.clients.request_building import chat_request, generate_request
from amusd.clients.request_options import OptionFields, Options
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.strategy import Strategy
from amusd.sampling.parameters import LogprobsOptions
from amusd.v1 import orchestrator_pb2 as pb
from amusd.v1 import sampling_pb2

TEXT = "Once"


def sampled(**fields: Any) -> sampling_pb2.Sampling:
    """Return the sampling of a request with these options."""
    return generate_request(TEXT, Options(**fields)).sampling


def test_keyword_arguments_are_the_fields_of_the_options() -> None:
    assert typing.get_type_hints(OptionFields) == typing.get_type_hints(Options)


def test_a_request_without_options_has_a_prompt_only() -> None:
    assert generate_request(TEXT) == pb.GenerateRequest(text=TEXT)
    message = pb.ChatMessage(role="user", content=TEXT)
    assert chat_request(TEXT) == pb.GenerateRequest(chat=pb.Chat(messages=[message]))


@pytest.mark.parametrize("tokens", [[3, 0, 2**32 - 1], (3,), range(3)])
def test_token_ids_are_sent_as_they_are(tokens: typing.Sequence[int]) -> None:
    assert list(generate_request(tokens).tokens.ids) == list(tokens)


def test_messages_are_a_conversation_for_both_calls() -> None:
    messages = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Hi"}]
    request = chat_request(messages)
    assert [(one.role, one.content) for one in request.chat.messages] == [
        ("system", "Rhyme."),
        ("user", "Hi"),
    ]
    assert generate_request(messages) == request


def test_the_parts_of_a_content_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    (message,) = chat_request([{"role": "user", "content": parts}]).chat.messages
    assert message.content == "one\ntwo"


def test_further_fields_of_a_message_are_sent_and_tool_arguments_as_objects() -> None:
    def call(arguments: Any) -> dict[str, Any]:
        return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}

    def assistant(arguments: Any) -> dict[str, Any]:
        return {"role": "assistant", "content": None, "name": None, "tool_calls": [call(arguments)]}

    for given, sent in (('{"x": 1}', {"x": 1}), ("no json", "no json"), ("[1]", "[1]")):
        (message,) = chat_request([assistant(given)]).chat.messages
        assert message.content == ""
        assert json.loads(message.fields_json) == {"tool_calls": [call(sent)]}


def test_tools_and_template_arguments_go_to_the_template() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    options = Options(tools=[tool], template_arguments={"thinks": False}, parse_special_tokens=True)
    chat = chat_request(TEXT, options).chat
    assert json.loads(chat.template_arguments_json) == {"tools": [tool], "thinks": False}
    assert chat.parse_special_tokens


def test_every_option_of_sampling_has_its_field() -> None:
    scales: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.25, "min_p": 0.125, "repetition_penalty": 1.5,
        "presence_penalty": -0.5, "frequency_penalty": 0.75,
    }  # fmt: skip
    counts: dict[str, Any] = {"top_k": 40, "no_repeat_ngram_size": 3, "seed": 2**64 - 1}
    lists: dict[str, Any] = {
        "allowed_token_ids": [1, 2],
        "bad_words": [[3, 4], [5]],
        "logit_bias": {7: -1.5},
    }
    assert sampled(**scales, **counts, **lists) == sampling_pb2.Sampling(
        **scales,
        **counts,
        allowed_token_ids=[1, 2],
        bad_words=[sampling_pb2.TokenSequence(ids=ids) for ids in ([3, 4], [5])],
        logit_bias={7: -1.5},
    )


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "seed"])
def test_a_zero_is_sent_and_none_is_not(name: Any) -> None:
    zero, nothing = dict[str, Any]({name: 0}), dict[str, Any]({name: None})
    assert sampled(**zero).HasField(name)
    assert not generate_request(TEXT, Options(**nothing)).HasField("sampling")


def test_options_of_the_output_have_their_fields() -> None:
    options = Options(
        "speculative", 9, 3, [5], True, True, min_tokens=2, stop="\n\n", include_stop=True, n=4
    )
    assert generate_request(TEXT, options) == pb.GenerateRequest(
        text=TEXT, strategy=pb.STRATEGY_SPECULATIVE, max_tokens=9, lookahead=3, stop_token_ids=[5],
        ignore_eos=True, timeline=True, min_tokens=2, stop=["\n\n"], include_stop=True,
        num_completions=4,
    )  # fmt: skip
    assert list(generate_request(TEXT, Options(stop=["a", "b"])).stop) == ["a", "b"]
    by_value = generate_request(TEXT, Options(Strategy.AMUSD))
    assert by_value == generate_request(TEXT, Options("amusd"))


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (True, sampling_pb2.LogprobsOptions()),
        (0, sampling_pb2.LogprobsOptions()),
        (1, sampling_pb2.LogprobsOptions(num_top=1)),
        (
            LogprobsOptions(2, is_processed=True, has_prompt=True),
            sampling_pb2.LogprobsOptions(num_top=2, is_processed=True, has_prompt=True),
        ),
    ],
)
def test_log_probabilities_are_asked_for(wanted: Any, expected: object) -> None:
    request = generate_request(TEXT, Options(logprobs=wanted))
    assert request.HasField("logprobs")
    assert request.logprobs == expected


@pytest.mark.parametrize("wanted", [None, False])
def test_log_probabilities_are_left_out(wanted: bool | None) -> None:
    assert not generate_request(TEXT, Options(logprobs=wanted)).HasField("logprobs")


SCHEMA = {"type": "object"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"json_schema": SCHEMA}, sampling_pb2.Constraint(json_schema='{"type": "object"}')),
        ({"json_schema": {}}, sampling_pb2.Constraint(json_schema="{}")),
        ({"json_schema": "true"}, sampling_pb2.Constraint(json_schema="true")),
        ({"json_object": True}, sampling_pb2.Constraint(json_object=True)),
        ({"regex": "a+"}, sampling_pb2.Constraint(regex="a+")),
        ({"grammar": 'start: "a"'}, sampling_pb2.Constraint(grammar='start: "a"')),
        (
            {"choices": ["yes", "no"]},
            sampling_pb2.Constraint(choices=sampling_pb2.Choices(texts=["yes", "no"])),
        ),
    ],
)
def test_each_form_of_an_output_has_its_field(fields: dict[str, Any], expected: object) -> None:
    assert sampled(**fields).constraint == expected


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": "hot"}, "temperature is 'hot': use a number"),
    ({"top_k": 1.5}, r"top_k is 1\.5: use a whole number"),
    ({"top_k": -1}, "top_k is -1: a request holds 0 to 4294967295"),
    ({"seed": 2**64}, "seed is 18446744073709551616: a request holds"),
    ({"n": 0}, "n is 0: a request holds 1 to"),
    ({"n": True}, "n is True: use a whole number"),
    ({"min_tokens": -1}, "min_tokens is -1: a request holds"),
    ({"logit_bias": {-1: 1.0}}, "token of logit_bias is -1"),
    ({"logit_bias": {5: "up"}}, "logit_bias of token 5 is 'up'"),
    ({"allowed_token_ids": ["a"]}, "token of allowed_token_ids is 'a'"),
    ({"bad_words": ["damn"]}, "bad_words has the text 'damn': give the token ids"),
    ({"bad_words": [[-1]]}, "token of bad_words is -1"),
    ({"stop": ["a\ud800"]}, "stop cannot be sent as UTF-8.*character 1"),
    ({"stop": [1]}, "stop is 1: use a text"),
    ({"regex": "a", "choices": ["b"]}, "regex and choices are set: an output has one form"),
    ({"json_schema": {"x": math.nan}}, "json_schema cannot be written as JSON"),
    ({"json_schema": {"x": object()}}, "json_schema cannot be written as JSON"),
    ({"regex": 1}, "regex is 1: use a text"),
    ({"logprobs": 21}, "num_top is 21: use 0 to 20"),
    ({"strategy": "magic"}, "unknown strategy 'magic': use autoregressive, speculative, amusd"),
    ({"tools": [{}]}, "tools needs a conversation"),
    ({"template_arguments": {"a": 1}}, "template_arguments needs a conversation"),
    ({"parse_special_tokens": True}, "parse_special_tokens needs a conversation"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_an_option_of_no_use_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        generate_request(TEXT, Options(**fields))


BAD_PROMPTS: list[tuple[Any, str]] = [
    ([], "the prompt is empty: give a text, a list of token ids or messages"),
    (7, "the prompt is a int: give"),
    ([1, "a"], "token is 'a'"),
    ([1.5], r"token is 1\.5"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS)
def test_a_prompt_of_no_use_is_refused(prompt: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        generate_request(prompt)


BAD_CONVERSATIONS: list[tuple[Any, str]] = [
    ([], "the conversation is empty"),
    ([1, 2], "message 1 is no dictionary"),
    ([{"role": "user", "content": "a"}, {"content": "b"}], "message 2 has no role"),
    ([{"role": "user"}], "message 1 is empty"),
    ([{"role": "user", "content": 5}], "content of message 1 is no text"),
    (
        [{"role": "user", "content": [{"type": "image_url"}]}],
        "message 1 has a part of type 'image_url': only text",
    ),
    ([{"role": "user", "content": ["hello"]}], "part without a type"),
    ([{"role": "user", "content": "a", "at": object()}], "message 1 cannot be written as JSON"),
    ("a\ud800", "cannot be sent as UTF-8.*character 1"),
]


@pytest.mark.parametrize(("conversation", "message"), BAD_CONVERSATIONS)
def test_a_conversation_of_no_use_is_refused(conversation: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        chat_request(conversation)


def test_building_a_request_changes_nothing_that_it_is_given() -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    options = Options(template_arguments={"a": 1}, tools=[{"name": "f"}], logit_bias={1: 1.0})
    before = json.dumps(messages), dataclasses.asdict(options)
    chat_request(messages, options)
    assert (json.dumps(messages), dataclasses.asdict(options)) == before
