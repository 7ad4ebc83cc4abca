"""Tool calls in the text of outputs, however the text is cut into pieces."""

import itertools
import json
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.tool_calls import (
    CallListParser,
    Event,
    FreeCallParser,
    NamedCallParser,
    ToolCall,
    ToolParser,
)

WEATHER = '{"name": "weather", "arguments": {"city": "Rome"}}'
TIME = '{"name": "time", "parameters": {}}'
CALL = ToolCall("weather", '{"city":"Rome"}')
TIME_CALL = ToolCall("time", "{}")
CASES = [
    ("Hello, world", ["Hello, world"]),
    (f"<tool_call>\n{WEATHER}\n</tool_call>", [CALL]),
    (f"I look.\n\n<tool_call>{WEATHER}</tool_call>", ["I look.", CALL]),
    (f"<tool_call>{WEATHER}</tool_call>\n<tool_call>{TIME}</tool_call>\n", [CALL, TIME_CALL]),
    (f"<tool_call>{WEATHER}</tool_call>\nDone.", [CALL, "Done."]),
    (f"<tool_call>{WEATHER}", [CALL]),
    ("<tool_call>no JSON</tool_call>", ["<tool_call>no JSON</tool_call>"]),
    ('<tool_call>{"name": "weath', ['<tool_call>{"name": "weath']),
    (WEATHER, [CALL]),
    (f"<|python_tag|>{WEATHER}", [CALL]),
    (f"{WEATHER}; {TIME}", [CALL, TIME_CALL]),
    (f"[{WEATHER}, {TIME}]", [CALL, TIME_CALL]),
    (f"[TOOL_CALLS] [{WEATHER}]", [CALL]),
    ('[TOOL_CALLS]weather{"city": "Rome"}', [CALL]),
    ('[TOOL_CALLS]weather[ARGS]{"city": "Rome"}[TOOL_CALLS]', None),
    ('{"name": "unknown", "arguments": {}}', ['{"name": "unknown", "arguments": {}}']),
    ('{"name": "Ada", "age": 36}', ['{"name": "Ada", "age": 36}']),
    ('{"answer": 42}', ['{"answer": 42}']),
    ("[1, 2]", ["[1, 2]"]),
    ("a < b and <tool", ["a < b and <tool"]),
    ("  ", ["  "]),
    (json.dumps({"values": list(range(100))}), [json.dumps({"values": list(range(100))})]),
]
TEXTS = st.text(alphabet='<tool_cal>/{}[]"name:,1 TOLCS\n', max_size=60)


def events_of(parser: ToolParser, pieces: Sequence[str]) -> list[Event]:
    """Return the events of an output in pieces; texts that follow one another as one."""
    found = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    joined: list[Event] = []
    for event in found:
        if isinstance(event, str) and joined and isinstance(joined[-1], str):
            joined[-1] += event
        else:
            joined.append(event)
    return joined


def free() -> ToolParser:
    return FreeCallParser(["weather", "time"])


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_calls_are_found_and_all_else_is_text(text: str, expected: list[Event] | None) -> None:
    assert events_of(free(), [text]) == ([text] if expected is None else expected)


@pytest.mark.parametrize(("text", "expected"), CASES)
@settings(max_examples=20)
@given(data=st.data())
def test_pieces_make_no_difference(
    text: str, expected: list[Event] | None, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)) | {0, len(text)})
    pieces = [text[start:end] for start, end in itertools.pairwise(cuts)]
    assert events_of(free(), pieces) == events_of(free(), [text])


@pytest.mark.parametrize("make", [free, CallListParser])
@given(text=TEXTS, cut=st.integers(0, 60))
def test_nothing_of_a_text_without_calls_is_lost(
    make: Callable[[], ToolParser], text: str, cut: int
) -> None:
    told = "".join(
        one for one in events_of(make(), [text[:cut], text[cut:]]) if isinstance(one, str)
    )
    kept = [one for one in text if not one.isspace()]
    if make is CallListParser:  # what is around the calls of a list is no content
        kept = [one for one in kept if one not in "[],"]
        told = "".join(one for one in told if one not in "[],")
    assert [one for one in told if not one.isspace()] == kept


def test_text_that_cannot_be_a_call_is_told_at_once() -> None:
    parser = FreeCallParser(["weather"])
    assert parser.feed("Hello") == ["Hello"]
    assert parser.feed(" <") == []
    assert parser.feed("3") == [" <3"]


def test_a_call_is_told_when_it_is_complete() -> None:
    parser = CallListParser()
    assert parser.feed(f"[{WEATHER}") == [CALL]
    assert parser.feed(f", {TIME[:-1]}") == []
    assert parser.feed("}]") == [TIME_CALL]
    assert parser.finish() == []


def test_a_named_call_without_output_has_no_events() -> None:
    parser = NamedCallParser("weather")
    assert parser.feed("") == []
    assert parser.finish() == []
