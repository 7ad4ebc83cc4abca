"""Writes a generation as a trace for ui.perfetto.dev and chrome://tracing.

The format is the Trace Event Format. Times are microseconds since the request arrived.
"""

from collections.abc import Iterator
from typing import Any

from amusd.analysis.device_timeline import DeviceTimeline, DeviceTimelines, Work, checks
from amusd.analysis.timeline import Message, Timeline
from amusd.protocol.events import Advance, Forward, Proposal, Rollback, Verdict

TraceEvent = dict[str, Any]

DRAFT, VERIFY, MESSAGES = 1, 2, 3  # thread ids, in display order
_PROCESS = 1
_THREAD_NAMES = {DRAFT: "draft device", VERIFY: "verify device", MESSAGES: "orchestrator"}


def trace(timeline: Timeline, devices: DeviceTimelines, about: dict[str, Any]) -> dict[str, Any]:
    """Return the trace; ``about`` describes the generation."""
    events = [
        *_names(),
        *_slices(devices.draft, DRAFT, "draft"),
        *_slices(devices.verify, VERIFY, "verify"),
        *_messages(timeline),
        *_arrows(devices),
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def _names() -> Iterator[TraceEvent]:
    for thread, name in _THREAD_NAMES.items():
        common = {"ph": "M", "pid": _PROCESS, "tid": thread}
        yield {**common, "name": "thread_name", "args": {"name": name}}
        yield {**common, "name": "thread_sort_index", "args": {"sort_index": thread}}
    yield {"ph": "M", "pid": _PROCESS, "name": "process_name", "args": {"name": "amusd"}}


def _slices(device: DeviceTimeline, thread: int, category: str) -> Iterator[TraceEvent]:
    common = {"ph": "X", "pid": _PROCESS, "tid": thread}
    for work in device.works:
        yield {
            **common,
            "name": work.kind.value,
            "cat": category,
            "ts": 1e6 * work.span.started_seconds,
            "dur": 1e6 * work.span.seconds,
            "args": _fields(work.message),
        }
    for span in device.idle:
        yield {
            **common,
            "name": "idle",
            "cat": "idle",
            "ts": 1e6 * span.started_seconds,
            "dur": 1e6 * span.seconds,
        }


def _messages(timeline: Timeline) -> Iterator[TraceEvent]:
    for event in timeline.events:
        yield {
            "ph": "i",
            "s": "p" if isinstance(event.message, Rollback) else "t",  # "p" marks all threads
            "pid": _PROCESS,
            "tid": MESSAGES,
            "name": type(event.message).__name__.lower(),
            "cat": "message",
            "ts": 1e6 * event.seconds,
            "args": _fields(event.message),
        }


def _arrows(devices: DeviceTimelines) -> Iterator[TraceEvent]:
    """Draw an arrow from each step to the pass that checked its token."""
    for number, check in enumerate(checks(devices), 1):
        common = {"pid": _PROCESS, "name": "proposal", "cat": "proposal", "id": number}
        yield {**common, "ph": "s", "tid": DRAFT, "ts": _middle(check.step)}
        yield {**common, "ph": "f", "bp": "e", "tid": VERIFY, "ts": _middle(check.checked_by)}


def _middle(work: Work) -> float:
    """Return a time within the work, so that the viewer binds the arrow to it."""
    return 5e5 * (work.span.started_seconds + work.span.ended_seconds)


def _fields(message: Message) -> dict[str, Any]:
    """Return the fields of a message, for its tooltip."""
    match message:
        case Proposal(epoch, position, tokens):
            return {
                "epoch": epoch,
                "position": position,
                "tokens": list(tokens),
                "source": message.source.value,
            }
        case Verdict(epoch, position, num_checked, num_accepted, next_token):
            return {
                "epoch": epoch,
                "position": position,
                "checked": num_checked,
                "accepted": num_accepted,
                "next_token": next_token,
            }
        case Forward(epoch, position, tokens) | Advance(epoch, position, tokens):
            return {"epoch": epoch, "position": position, "tokens": list(tokens)}
        case Rollback(epoch, verified_position, corrected_token):
            return {
                "epoch": epoch,
                "verified_position": verified_position,
                "corrected_token": corrected_token,
            }
