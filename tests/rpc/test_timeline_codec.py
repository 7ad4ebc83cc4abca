"""Timelines to messages and back."""

import pytest

from amusd.analysis.timeline import MAX_ENTRIES, Message, Timeline, TimelineEvent, TimelineRecorder
from amusd.protocol.errors import UnavailableError
from amusd.protocol.events import (
    NOTHING,
    Advance,
    Decision,
    DeviceTime,
    Forward,
    Proposal,
    Rollback,
    Verdict,
)
from amusd.rpc import timeline_codec
from amusd.rpc.channel import MAX_MESSAGE_BYTES
from amusd.v1 import orchestrator_pb2

NOW = 1_800_000_000_000_000_000
DEVICE_TIMES = (DeviceTime(NOW, 0.1),)
MESSAGES: tuple[Message, ...] = (
    Proposal(1, 5, (7, 8), 0.25, 1, device_seconds=0.25, steps=(DeviceTime(NOW, 0.25),)),
    Verdict(1, 5, 2, 1, 9, 0.5, 0.5, 3, (DeviceTime(NOW + 1, 0.5),)),
    Forward(1, 5, (7, 8), 4),
    Advance(1, 5, (7,), 6),
    Rollback(2, 7, 9, 5),
)


def test_a_timeline_keeps_every_kind_of_event() -> None:
    events = tuple(TimelineEvent(0.5 * index, one) for index, one in enumerate(MESSAGES))
    timeline = Timeline(NOW, events, is_truncated=True)
    message = timeline_codec.timeline_to_proto(timeline)
    assert message is not None
    assert timeline_codec.timeline_from_proto(message) == timeline


def test_no_timeline_is_no_message() -> None:
    assert timeline_codec.timeline_to_proto(None) is None


def test_an_unknown_event_is_refused() -> None:
    unknown = orchestrator_pb2.Timeline(events=[orchestrator_pb2.TimelineEvent(seconds=1.0)])
    with pytest.raises(UnavailableError, match="does not know"):
        timeline_codec.timeline_from_proto(unknown)


@pytest.mark.parametrize(
    ("event", "decision"),
    [
        (Proposal(9999, 99999, (99999,), 0.1, 1, device_seconds=0.1, steps=DEVICE_TIMES), NOTHING),
        (Proposal(9999, 99999, (), 0.1, 64, device_seconds=0.1), NOTHING),
        (Verdict(9999, 99999, 60, 50, 99999, 0.1, 0.1, 9999, DEVICE_TIMES), NOTHING),
        (None, Decision(rollback=Rollback(9999, 99999, 99999, 64))),
        (None, Decision(advance=Advance(9999, 99999, (99999,) * 64, 64))),
    ],
)
def test_the_longest_timeline_fits_into_a_message(event: object, decision: Decision) -> None:
    recorder = TimelineRecorder(NOW - 10**12)
    for _ in range(MAX_ENTRIES + 1):
        recorder.decided(event, decision, NOW)
    timeline = recorder.timeline()
    assert timeline.is_truncated
    message = timeline_codec.timeline_to_proto(timeline)
    assert message is not None
    assert message.ByteSize() < MAX_MESSAGE_BYTES * 3 / 4
