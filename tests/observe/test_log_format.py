"""The formats of log lines."""

import json
import logging
import sys

from amusd.observe.log_format import JsonFormatter, TextFormatter, current_session


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("amusd.part", logging.WARNING, "file.py", 1, message, (), None)
    made.__dict__.update(extra)
    return made


def test_json_is_one_line_for_any_content() -> None:
    token = current_session.set("a\nb")
    try:
        line = JsonFormatter("verify").format(record("one\ntwo", fields={"tokens": 3}))
    finally:
        current_session.reset(token)
    assert "\n" not in line
    read = json.loads(line)
    assert (read["message"], read["session"], read["tokens"]) == ("one\ntwo", "a\nb", 3)
    assert (read["level"], read["service"], read["logger"]) == ("WARNING", "verify", "amusd.part")
    assert read["time"].endswith("+00:00")


def test_json_keeps_a_traceback() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        line = JsonFormatter("verify").format(record("failed", exc_info=sys.exc_info()))
    assert "ValueError: why" in json.loads(line)["traceback"]


def test_text_ends_with_the_fields_and_the_session() -> None:
    token = current_session.set("abc")
    try:
        line = TextFormatter("draft").format(record("session ended", fields={"tokens": 3}))
    finally:
        current_session.reset(token)
    assert line.endswith("WARNING draft session ended tokens=3 session='abc'")


def test_outside_a_session_nothing_is_added() -> None:
    assert TextFormatter("draft").format(record("ready")).endswith("WARNING draft ready")
    assert "session" not in json.loads(JsonFormatter("draft").format(record("ready")))
