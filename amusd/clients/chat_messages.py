"""Conversations as people and other libraries write them, and their messages in the protocol."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from amusd.protocol.errors import InvalidInputError
from amusd.v1 import orchestrator_pb2

Conversation = str | Sequence[Mapping[str, Any]]
"""The text of one user message, or messages in the format of the OpenAI API."""


def user_message(content: str) -> dict[str, Any]:
    """Return a message of the user."""
    return {"role": "user", "content": content}


def chat_messages(conversation: Conversation) -> Iterator[orchestrator_pb2.ChatMessage]:
    """Yield the messages of a conversation.

    Raises:
        InvalidInputError: there is no message, or one is none; the error names it.
    """
    messages = [user_message(conversation)] if isinstance(conversation, str) else conversation
    if not messages:
        raise InvalidInputError("the conversation is empty: give it at least one message")
    for number, message in enumerate(messages, start=1):
        yield _message(message, f"message {number}")


def json_text(value: Any, name: str) -> str:
    """Return ``value`` as JSON.

    Raises:
        InvalidInputError: JSON cannot hold it; the error names it.
    """
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"{name} cannot be written as JSON: {error}") from None


def _message(message: Any, name: str) -> orchestrator_pb2.ChatMessage:
    if not isinstance(message, Mapping):
        raise InvalidInputError(f"{name} is no dictionary: write role and content in it")
    further = {key: value for key, value in message.items() if key not in ("role", "content")}
    further = {key: value for key, value in further.items() if value is not None}
    role, content = message.get("role"), _content(message.get("content"), name)
    if not isinstance(role, str) or not role:
        raise InvalidInputError(f'{name} has no role: give it one, such as "user"')
    if not content and not further:
        raise InvalidInputError(f"{name} is empty: give it content")
    if "tool_calls" in further:
        further["tool_calls"] = _tool_calls(further["tool_calls"])
    fields = json_text(further, name) if further else ""
    return orchestrator_pb2.ChatMessage(role=role, content=content, fields_json=fields)


def _content(content: Any, name: str) -> str:
    """Return the text of a message, whose parts are joined by line breaks."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, Sequence):
        return "\n".join(_part(part, name) for part in content)
    raise InvalidInputError(f"the content of {name} is no text: use a string or a list of parts")


def _part(part: Any, name: str) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": str(kind)}:
            raise InvalidInputError(f"{name} has a part of type {kind!r}: only text is served")
    raise InvalidInputError(f'{name} has a part without a type: write {{"type": "text", ...}}')


def _tool_calls(calls: Any) -> Any:
    """Return tool calls with their arguments as objects, which chat templates expect."""
    return [_tool_call(call) for call in calls] if isinstance(calls, list) else calls


def _tool_call(call: Any) -> Any:
    match call:
        case {"function": {"arguments": str(text)} as function}:
            try:
                arguments = json.loads(text)
            except ValueError:
                return call
            if isinstance(arguments, dict):
                return {**call, "function": {**function, "arguments": arguments}}
    return call
