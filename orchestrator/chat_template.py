"""Renders conversations with the chat templates of a model. It knows no tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.nodes

from amusd.library_output import one_line
from amusd.protocol.errors import InvalidInputError, NotServedError
from orchestrator.template_sandbox import (
    MAX_CHARACTERS,
    MAX_SECONDS,
    TemplateBoundError,
    TemplateSandbox,
)

_ASSISTANT = "assistant"
# Marks the end of the message to continue. Its space shows whether the template trims messages.
_END_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplates:
    """The chat templates of one model, by name, and the special tokens that they write."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """Compile the templates ``default`` and ``tool_use``; the others are never used.

        Raises:
            jinja2.TemplateError: a template does not compile.
        """
        self._special_tokens = dict(special_tokens)
        self._names = sorted(sources)
        self._templates = {
            name: _Template(sources[name]) for name in ("default", "tool_use") if name in sources
        }

    def choose(self, arguments: Mapping[str, Any]) -> "_Template":
        """Return the template for a request with ``arguments``.

        Raises:
            NotServedError: there is no such template.
        """
        if arguments.get("tools") is not None and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" in self._templates:
            return self._templates["default"]
        if self._names:
            raise NotServedError(
                f"the model has the chat templates {', '.join(self._names)}, and none is the "
                "default: send the prompt as text"
            )
        raise NotServedError("the model has no chat template: send the prompt as text")

    def render(self, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> str:
        """Return the text of a conversation, up to where the assistant goes on.

        A last message of the assistant is left open. Otherwise its next message is begun.

        Raises:
            NotServedError: the model has no template.
            InvalidInputError: the template refuses the messages, or exceeds a bound.
        """
        template = self.choose(arguments)
        variables = {**self._special_tokens, "tools": None, "documents": None, **arguments}
        messages = [_with_reasoning(message) for message in messages]
        if messages[-1].get("role") != _ASSISTANT:
            return template.render(
                {**variables, "messages": messages, "add_generation_prompt": True}
            )
        last, content = _tagged(messages[-1])
        rendered = template.render(
            {**variables, "messages": [*messages[:-1], last], "add_generation_prompt": False}
        )
        return _before_tag(rendered, content)


class _Template:
    """One compiled template."""

    def __init__(self, source: str) -> None:
        sandbox = TemplateSandbox()
        self._sandbox = sandbox
        try:
            self._template = sandbox.from_string(source)
            self.literal_text = _literal_text(sandbox.parse(source))
        except jinja2.TemplateError:
            raise
        except Exception as error:  # for example a recursion that is too deep
            raise jinja2.TemplateError(one_line(error)) from error

    def render(self, variables: Mapping[str, Any]) -> str:
        try:
            with self._sandbox.deadline(MAX_SECONDS):
                return self._write(variables)
        except Exception as error:  # a template may raise whatever Python raises
            raise InvalidInputError(
                f"the chat template refuses the messages: {one_line(error)}"
            ) from error

    def _write(self, variables: Mapping[str, Any]) -> str:
        pieces, size = [], 0
        for piece in self._template.generate(variables):
            self._sandbox.tick()
            pieces.append(piece)
            size += len(piece)
            if size > MAX_CHARACTERS:
                raise TemplateBoundError(f"it writes more than {MAX_CHARACTERS} characters")
        text = "".join(pieces)
        text.encode()  # a lone surrogate is an error of the template, too
        return text


def _literal_text(source: jinja2.nodes.Template) -> str:
    """Return the texts in a template, apart from one another."""
    texts = [node.data for node in source.find_all(jinja2.nodes.TemplateData)]
    constants = [node.value for node in source.find_all(jinja2.nodes.Const)]
    return "\0".join(texts + [value for value in constants if isinstance(value, str)])


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose reasoning has all names under which templates read it."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _tagged(message: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return a message with a tag at the end of its text, and the text."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + _END_TAG}, content
    for index, part in reversed(list(enumerate(content if isinstance(content, list) else ()))):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            parts = list(content or ())
            parts[index] = {**part, "text": part["text"] + _END_TAG}
            return {**message, "content": parts}, part["text"]
    raise InvalidInputError("the last message is the assistant's and has no text to continue")


def _before_tag(rendered: str, content: str) -> str:
    """Return what a template wrote before the end of the message to continue.

    Raises:
        InvalidInputError: the template did not write the message as it is.
    """
    end = rendered.rfind(_END_TAG.strip())
    if end < 0 or content.strip() not in rendered:
        raise InvalidInputError(
            "the last message is the assistant's, and the chat template does not write it as it "
            "is, so it cannot be continued: end the chat with another role's message"
        )
    is_trimmed = not rendered.startswith(_END_TAG, end)
    return rendered[:end].rstrip() if is_trimmed else rendered[:end]
