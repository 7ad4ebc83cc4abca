"""Answers of /decode: the events of one generation as they happen, for the page that shows them."""

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from amusd.v1 import draft_pb2, model_pb2, orchestrator_pb2, verify_pb2
from gateway.answer_format import finish_reason
from gateway.api_errors import ApiError
from gateway.chat_request import chat_job
from gateway.completion_request import completion_job
from gateway.gateway_metrics import RequestRecord
from gateway.generation_calls import Numbered
from gateway.http_io import DONE, Exchange
from gateway.job import Job
from gateway.request_fields import Fields
from gateway.usage import Usage

_SOURCES: dict[int, str] = {
    model_pb2.DRAFT_SOURCE_MODEL: "model",
    model_pb2.DRAFT_SOURCE_LOOKUP: "lookup",
}


def decode_job(fields: Fields, model_names: Iterable[str], default_temperature: float) -> Job:
    """Return what a request asks for: one output for one conversation (messages), or for a text.

    Raises:
        ApiError: a field is wrong, or there is more than one output.
    """
    translate = chat_job if fields.has("messages") else completion_job
    job = translate(fields, model_names, default_temperature)
    if job.num_choices != 1:
        raise ApiError(400, "one output can be watched: send one prompt, and n of 1", param="n")
    job.requests[0].stream_timeline = True
    return job


class DecodeAnswer:
    """Writes the events of one generation."""

    def __init__(
        self, job: Job, names: Sequence[str], info: orchestrator_pb2.GetServerInfoResponse
    ) -> None:
        """Write the answer of ``job``."""
        self.job = job
        self.usage = Usage(job.num_choices)
        self._texts: dict[int, str] = {}

    async def write(
        self, messages: AsyncIterator[Numbered], exchange: Exchange, record: RequestRecord
    ) -> None:
        """Send each event as it comes."""
        async for prompt, response in messages:
            record.answered()
            if not exchange.has_begun:
                await exchange.begin_events()
            event = self._event(prompt, response)
            if event is not None:
                await exchange.send_events([event])
        await exchange.send_bytes(DONE, more=False)

    def _event(
        self, prompt: int, response: orchestrator_pb2.GenerateResponse
    ) -> dict[str, Any] | None:
        match response.WhichOneof("part"):
            case "event":
                return self._live(response.event)
            case "chunk":
                return {"event": "text", "text": response.chunk.text}
            case _:
                completion = response.completion
                self.usage.add(prompt, completion.statistics)
                return {
                    "event": "end",
                    "text": completion.text,
                    "finish_reason": finish_reason(completion),
                    "seconds": completion.statistics.wall_seconds,
                    "num_tokens": completion.statistics.num_output_tokens,
                    "fallback_reason": completion.statistics.fallback_reason,
                }

    def _live(self, live: orchestrator_pb2.LiveEvent) -> dict[str, Any] | None:
        for named in live.texts:
            self._texts[named.token_id] = named.text.decode(errors="replace")
        event = live.event
        match event.WhichOneof("message"):
            case "proposal":
                return {"seconds": event.seconds, **self._proposal(event.proposal)}
            case "verdict":
                return {"seconds": event.seconds, **self._verdict(event.verdict)}
            case "rollback":
                return {"seconds": event.seconds, **self._rollback(event.rollback)}
            case _:
                return None  # what was sent repeats what had come

    def _proposal(self, proposal: draft_pb2.Proposal) -> dict[str, Any]:
        return {
            "event": "proposal",
            "epoch": proposal.epoch,
            "position": proposal.position,
            "tokens": self._named(proposal.token_ids),
            "source": _SOURCES.get(proposal.source, "model"),
            "branches": [
                {
                    "position": branch.position,
                    "token": self._named([branch.token_id])[0],
                    "tokens": self._named(branch.token_ids),
                }
                for branch in proposal.branches
            ],
            "device_seconds": proposal.device_seconds,
        }

    def _verdict(self, verdict: verify_pb2.Verdict) -> dict[str, Any]:
        return {
            "event": "verdict",
            "epoch": verdict.epoch,
            "position": verdict.position,
            "num_accepted": verdict.num_accepted,
            "next": self._named([verdict.next_token_id])[0],
            "device_seconds": verdict.device_seconds,
        }

    def _rollback(self, rollback: draft_pb2.RollbackRequest) -> dict[str, Any]:
        return {
            "event": "rollback",
            "epoch": rollback.epoch,
            "position": rollback.verified_position,
            "branch": self._named(rollback.branch_token_ids),
        }

    def _named(self, tokens: Iterable[int]) -> list[dict[str, Any]]:
        return [{"id": token, "text": self._texts.get(token, "")} for token in tokens]
