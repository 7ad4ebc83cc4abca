"""The conversation of a request: its JSON fields are checked, and a bad one is said."""

import json

import pytest

from amusd.protocol.errors import InvalidInputError
from amusd.v1.orchestrator_pb2 import Chat, ChatMessage
from orchestrator.chat import Message, chat_from_proto


def test_a_message_has_its_fields_and_no_nulls() -> None:
    fields = {"tool_calls": [{"name": "add"}], "name": None}
    message = ChatMessage(role="assistant", content="x", fields_json=json.dumps(fields))
    chat = chat_from_proto(Chat(messages=[message]))
    expected = {"role": "assistant", "content": "x", "tool_calls": [{"name": "add"}]}
    assert chat.messages[0].as_dict() == expected
    assert not chat.parse_special_tokens


def test_a_message_with_fields_needs_no_content() -> None:
    message = ChatMessage(role="assistant", fields_json='{"tool_calls": []}')
    assert chat_from_proto(Chat(messages=[message])).messages == (
        Message("assistant", "", {"tool_calls": []}),
    )


def test_arguments_go_to_the_template() -> None:
    arguments = {"tools": [{"name": "add"}], "enable_thinking": False}
    chat = chat_from_proto(
        Chat(
            messages=[ChatMessage(role="user", content="x")],
            template_arguments_json=json.dumps(arguments),
            parse_special_tokens=True,
        )
    )
    assert (chat.arguments, chat.parse_special_tokens) == (arguments, True)


@pytest.mark.parametrize(
    ("fields", "arguments", "words"),
    [
        ("{", "", "fields_json is no valid JSON"),
        ("[]", "", "fields_json is no JSON object"),
        ("[" * 100_000, "", "fields_json is no valid JSON"),
        ("", "1", "template_arguments_json is no JSON object"),
        ("", '{"messages": []}', "sets 'messages'"),
        ("", '{"add_generation_prompt": false}', "sets 'add_generation_prompt'"),
        ("", '{"tools": "add"}', "tools in template_arguments_json is no list"),
        ("", '{"documents": [1]}', "documents in template_arguments_json is no list"),
    ],
)
def test_broken_json_is_named(fields: str, arguments: str, words: str) -> None:
    message = ChatMessage(role="user", content="x", fields_json=fields)
    with pytest.raises(InvalidInputError, match=words):
        chat_from_proto(Chat(messages=[message], template_arguments_json=arguments))


def test_an_empty_conversation_or_message_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="at least one message"):
        chat_from_proto(Chat())
    with pytest.raises(InvalidInputError, match="give each one content"):
        chat_from_proto(Chat(messages=[ChatMessage(role="user")]))
