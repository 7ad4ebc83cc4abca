"""Finds tool calls in the text of an output, while it comes.

Known are the formats of Hermes and Qwen (``<tool_call>{...}</tool_call>``), of Llama 3 (the output
is one or several JSON objects, with ``;`` between them) and of Mistral (``[TOOL_CALLS]`` and a
list, or names with their arguments; the marker is a special token, so the list may come alone).
A call is an object with ``name`` and ``arguments`` or ``parameters``. What is none stays text, so
nothing of an output is lost. A call is told when it is complete.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_MISTRAL = "[TOOL_CALLS]"
_PYTHON_TAG = "<|python_tag|>"
_MARKERS = (_OPEN, _MISTRAL, _PYTHON_TAG)
_PLAUSIBLE_WITHIN = 128  # characters in which a call without a marker has its first field
_NAMED_CALL = re.compile(r"\s*([\w.-]+)\s*(?:\[ARGS\])?\s*(?=\{)")
_BETWEEN_CALLS = " \n\t\r,[]"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A complete call; ``arguments`` is JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The beginning of a call whose arguments follow as pieces."""

    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsPiece:
    """Further JSON text of the arguments of the call that has begun."""

    text: str


Event = str | ToolCall | CallStart | ArgumentsPiece
"""A piece of the content, or of a tool call."""


class ToolParser(Protocol):
    """Turns the text of one output into events."""

    def feed(self, text: str) -> list[Event]:
        """Return what is known after further text."""

    def finish(self) -> list[Event]:
        """Return the rest at the end of the output."""


class NamedCallParser:
    """For an output that is the arguments of one function."""

    def __init__(self, name: str) -> None:
        """Parse a call of the function ``name``."""
        self._name = name
        self._has_begun = False

    def feed(self, text: str) -> list[Event]:
        """Return the text as a piece of the arguments."""
        if not text:
            return []
        begin: list[Event] = [] if self._has_begun else [CallStart(self._name)]
        self._has_begun = True
        return [*begin, ArgumentsPiece(text)]

    def finish(self) -> list[Event]:
        """Return nothing: all pieces were told."""
        return []


class CallListParser:
    """For an output that is a JSON list of calls, as a constraint makes it."""

    def __init__(self) -> None:
        """Start before the list."""
        self._waiting = ""

    def feed(self, text: str) -> list[Event]:
        """Return the calls that are complete."""
        self._waiting += text
        events: list[Event] = []
        while (begin := self._waiting.find("{")) >= 0:
            try:
                value, end = _DECODER.raw_decode(self._waiting, begin)
            except ValueError:
                break
            call = _call_of(value, None)
            between = self._waiting[:begin].strip(_BETWEEN_CALLS)
            events += [between] if between else []
            events.append(self._waiting[begin:end] if call is None else call)
            self._waiting = self._waiting[end:]
        return events

    def finish(self) -> list[Event]:
        """Return a call that was cut off as text."""
        rest = self._waiting.lstrip(_BETWEEN_CALLS)
        return [rest] if rest else []


class FreeCallParser:
    """For an output in which the model decides whether it calls a tool."""

    def __init__(self, names: Collection[str]) -> None:
        """Know the functions ``names``; calls of others without a marker are text."""
        self._names = frozenset(names)
        self._waiting = ""
        self._state: Callable[[], list[Event] | None] = self._begin

    def feed(self, text: str) -> list[Event]:
        """Return what is certain after further text."""
        self._waiting += text
        events: list[Event] = []
        # Each state returns events and perhaps the next state; None: it needs more text.
        while self._waiting and (found := self._state()) is not None:
            events += found
        return events

    def finish(self) -> list[Event]:
        """Return the rest: calls that are complete, and text."""
        events, rest = self.feed(""), self._waiting
        self._waiting = ""
        if not rest:
            return events
        if self._state == self._in_tag:
            call = _parsed_call(rest.removeprefix(_OPEN), None)
            return [*events, rest if call is None else call]
        if self._state == self._in_rest:
            calls = _calls_in(rest, None if rest.lstrip().startswith(_MISTRAL) else self._names)
            return [*events, *(calls or [rest])]
        return [*events, rest]

    def _begin(self) -> list[Event] | None:
        text = self._waiting.lstrip()
        if not text or any(one.startswith(text) for one in _MARKERS):
            return None
        is_bare = text[0] in "{[" and not text.startswith(_MISTRAL)
        self._state = self._in_bare if is_bare else self._in_text
        return []

    def _in_text(self) -> list[Event] | None:
        text = self._waiting
        found = [place for one in _MARKERS if (place := text.find(one)) >= 0]
        if found:
            place = min(found)
            is_tag = text.startswith(_OPEN, place)
            self._state = self._in_tag if is_tag else self._in_rest
            self._waiting = text[place:]
            before = text[:place].rstrip()
            return [before] if before else []
        # Spaces before a marker are not content, so they wait for what follows.
        certain = len(text[: len(text) - _possible_marker(text)].rstrip())
        self._waiting = text[certain:]
        return [text[:certain]] if certain else None

    def _in_tag(self) -> list[Event] | None:
        end = self._waiting.find(_CLOSE)
        if end < 0:
            return None
        whole, inside = self._waiting[: end + len(_CLOSE)], self._waiting[len(_OPEN) : end]
        self._waiting = self._waiting[end + len(_CLOSE) :]
        self._state = self._after_tag
        call = _parsed_call(inside, None)
        return [whole if call is None else call]

    def _after_tag(self) -> list[Event] | None:
        """Drop the line break between calls."""
        self._waiting = self._waiting.lstrip()
        if not self._waiting:
            return None
        self._state = self._in_text
        return []

    def _in_bare(self) -> list[Event] | None:
        """Keep an output that is JSON until it ends, unless it cannot be a call."""
        begin = self._waiting[:_PLAUSIBLE_WITHIN]
        if len(begin) == _PLAUSIBLE_WITHIN and '"name"' not in begin:
            self._state = self._in_text
            return []
        self._state = self._in_rest if '"name"' in begin else self._state
        return None

    def _in_rest(self) -> list[Event] | None:
        return None


def _possible_marker(text: str) -> int:
    """Return the length of the end of ``text`` that may begin a marker."""
    for length in range(min(len(text), max(map(len, _MARKERS)) - 1), 0, -1):
        if any(one.startswith(text[-length:]) for one in _MARKERS):
            return length
    return 0


def _calls_in(text: str, names: Collection[str] | None) -> list[Event]:
    """Return the calls that ``text`` consists of; none if it has anything else."""
    bare = text.strip().removeprefix(_MISTRAL).removeprefix(_PYTHON_TAG).lstrip()
    calls: list[Event] = []
    try:
        for value in _values_in(bare):
            call = _call_of(value, names)
            if call is None:
                return []
            calls.append(call)
    except ValueError:
        return []
    return calls


def _values_in(text: str) -> Iterator[Any]:
    """Yield the JSON values of a text, those of lists one by one.

    Raises:
        ValueError: there is something else.
    """
    place = 0
    while place < len(text):
        named = _NAMED_CALL.match(text, place)
        start = named.end() if named else place
        value, place = _DECODER.raw_decode(text, start)
        if named:
            value = {"name": named[1], "arguments": value}
        yield from value if isinstance(value, list) else [value]
        place += len(text) - place - len(text[place:].lstrip("; \n\t\r"))


def _parsed_call(text: str, names: Collection[str] | None) -> ToolCall | None:
    try:
        return _call_of(json.loads(text), names)
    except ValueError:
        return None


def _call_of(value: Any, names: Collection[str] | None) -> ToolCall | None:
    """Return the call that a JSON value describes; None if it is none of ``names`` (None: any)."""
    if not isinstance(value, dict):
        return None
    name = value.get("name")
    arguments = value.get("arguments", value.get("parameters"))
    if not isinstance(name, str) or (names is not None and name not in names):
        return None
    if isinstance(arguments, str):
        return ToolCall(name, arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return None
    return ToolCall(name, orjson.dumps(arguments).decode())
