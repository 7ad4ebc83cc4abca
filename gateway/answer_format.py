"""What every answer has: its envelope, and how the end of an output is named."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from amusd.v1 import orchestrator_pb2, sampling_pb2
from gateway.job import Job

_REASONS = {
    orchestrator_pb2.FINISH_REASON_STOP: "stop",
    orchestrator_pb2.FINISH_REASON_LENGTH: "length",
}


@dataclass(frozen=True, slots=True)
class Envelope:
    """The fields around the choices of an answer; ``created`` is in seconds since 1970."""

    request_id: str
    created: int
    model: str
    fingerprint: str

    def around(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return an answer or chunk of the object type ``kind``."""
        return {
            "id": self.request_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


class AnswerFormat(Protocol):
    """Writes the choices of one endpoint. It keeps the state of an answer's choices.

    ``prompt`` is the number of the prompt that a message answers.
    """

    id_prefix: str
    whole_kind: str
    chunk_kind: str

    def piece(self, prompt: int, chunk: orchestrator_pb2.Chunk) -> list[dict[str, Any]]:
        """Return the choices of a chunk of a streamed answer, 0 or more."""

    def end(self, prompt: int, completion: orchestrator_pb2.Completion) -> list[dict[str, Any]]:
        """Return the last choices of an output of a streamed answer, 1 or more."""

    def keep(self, prompt: int, chunk: orchestrator_pb2.Chunk) -> None:
        """Keep a chunk of an answer that comes as one object."""

    def whole(self, prompt: int, completion: orchestrator_pb2.Completion) -> dict[str, Any]:
        """Return the whole choice of an output whose chunks were kept."""


class KeptOutput:
    """The chunks of one output of an answer that comes as one object."""

    def __init__(self) -> None:
        """Start without a chunk."""
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[sampling_pb2.PositionLogprobs] = []

    def add(self, chunk: orchestrator_pb2.Chunk) -> None:
        """Keep a chunk."""
        self.texts.append(chunk.text)
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs


def finish_reason(completion: orchestrator_pb2.Completion) -> str:
    """Return why an output ended, in OpenAI's words."""
    return _REASONS.get(completion.finish_reason, "stop")


def end_fields(job: Job, completion: orchestrator_pb2.Completion) -> dict[str, Any]:
    """Return the fields of a choice beyond OpenAI's: what stopped the output, and its seed.

    As vLLM does, ``stop_reason`` is null for the model's own end-of-text tokens.
    """
    token = completion.stop_token_id if completion.HasField("stop_token_id") else None
    asked_for = token is not None and token in job.requests[0].stop_token_ids
    reason = completion.stop_text or (token if asked_for else None)
    found: dict[str, Any] = {"stop_reason": reason}
    if completion.seed:
        found["seed"] = completion.seed
    return found
