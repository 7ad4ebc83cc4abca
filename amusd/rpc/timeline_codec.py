"""The codec of timelines, which only requests that set ``timeline`` need."""

from amusd.analysis.timeline import Message, Timeline, TimelineEvent
from amusd.protocol.errors import UnavailableError
from amusd.protocol.events import Advance, Forward, Proposal, Rollback, Verdict
from amusd.rpc import codec
from amusd.v1 import orchestrator_pb2


def timeline_to_proto(timeline: Timeline | None) -> orchestrator_pb2.Timeline | None:
    """Return the message of a timeline, or None for None."""
    if timeline is None:
        return None
    return orchestrator_pb2.Timeline(
        started_unix_nanos=timeline.started_unix_nanos,
        events=[event_to_proto(event) for event in timeline.events],
        is_truncated=timeline.is_truncated,
        max_branches=timeline.max_branches,
    )


def timeline_from_proto(timeline: orchestrator_pb2.Timeline) -> Timeline:
    """Return the timeline of a message.

    Raises:
        UnavailableError: the message holds an unknown kind of event.
    """
    return Timeline(
        timeline.started_unix_nanos,
        tuple(TimelineEvent(event.seconds, _message(event)) for event in timeline.events),
        timeline.is_truncated,
        timeline.max_branches,
    )


def event_to_proto(event: TimelineEvent) -> orchestrator_pb2.TimelineEvent:
    """Return the message of an event."""
    message, seconds = event.message, event.seconds
    match message:
        case Proposal():
            proposal = codec.proposal_to_proto(message).proposal
            return orchestrator_pb2.TimelineEvent(seconds=seconds, proposal=proposal)
        case Verdict():
            verdict = codec.verdict_to_proto(message).verdict
            return orchestrator_pb2.TimelineEvent(seconds=seconds, verdict=verdict)
        case Forward():
            forward = codec.forward_to_proto(message).proposals
            return orchestrator_pb2.TimelineEvent(seconds=seconds, forward=forward)
        case Advance():
            advance = codec.advance_to_proto(message).advance
            return orchestrator_pb2.TimelineEvent(seconds=seconds, advance=advance)
        case Rollback():
            rollback = codec.rollback_to_proto(message, session_id="")
            return orchestrator_pb2.TimelineEvent(seconds=seconds, rollback=rollback)


def _message(event: orchestrator_pb2.TimelineEvent) -> Message:
    match event.WhichOneof("message"):
        case "proposal":
            return codec.proposal_from_proto(event.proposal)
        case "verdict":
            return codec.verdict_from_proto(event.verdict)
        case "forward":
            return codec.forward_from_proto(event.forward)
        case "advance":
            return codec.advance_from_proto(event.advance)
        case "rollback":
            return codec.rollback_from_proto(event.rollback)
        case _:
            raise UnavailableError(
                "the orchestrator's timeline holds an event that this client does not know: "
                "use the client of the orchestrator's version"
            )
