"""A conversation as a client sends it, in plain values. It knows neither templates nor tokens."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from amusd.protocol.errors import InvalidInputError
from amusd.v1 import orchestrator_pb2

_RESERVED = ("messages", "add_generation_prompt")


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation; ``fields`` holds what it has beside role and content."""

    role: str
    content: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the message as a chat template reads it. Fields that are null are left out."""
        merged = {"role": self.role, "content": self.content, **self.fields}
        return {name: value for name, value in merged.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation and how it is rendered.

    ``arguments`` are further variables of the chat template, such as ``tools``.
    ``parse_special_tokens`` lets the names of special tokens in the messages become these tokens.
    """

    messages: tuple[Message, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    parse_special_tokens: bool = False


def chat_from_proto(chat: orchestrator_pb2.Chat) -> Chat:
    """Check the conversation of a request.

    Raises:
        InvalidInputError: there is no message, a message is empty, or a JSON field is broken.
    """
    messages = tuple(_message(one) for one in chat.messages)
    if not messages:
        raise InvalidInputError("the chat is empty: send at least one message")
    arguments = _object(chat.template_arguments_json, "template_arguments_json")
    for name in _RESERVED:
        if name in arguments:
            raise InvalidInputError(
                f"template_arguments_json sets {name!r}, which the messages decide: leave it out"
            )
    for name in ("tools", "documents"):
        _check_list(name, arguments.get(name))
    return Chat(messages, arguments, chat.parse_special_tokens)


def _message(message: orchestrator_pb2.ChatMessage) -> Message:
    fields = _object(message.fields_json, "fields_json")
    if not message.content and not fields:
        raise InvalidInputError("a chat message is empty: give each one content")
    return Message(message.role, message.content, fields)


def _object(text: str, name: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{name} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidInputError(f"{name} is no JSON object: send names and values in braces")
    return value


def _check_list(name: str, value: object) -> None:
    if value is None or (isinstance(value, list) and all(isinstance(one, dict) for one in value)):
        return
    raise InvalidInputError(f"{name} in template_arguments_json is no list of JSON objects")
