"""Answers in OpenAI's format: as a stream of events, or as one object."""

import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from amusd.v1 import orchestrator_pb2
from gateway.answer_format import AnswerFormat, Envelope
from gateway.gateway_metrics import RequestRecord
from gateway.generation_calls import Numbered
from gateway.http_io import DONE, Exchange
from gateway.job import Job
from gateway.usage import Usage


def _fingerprint(info: orchestrator_pb2.GetServerInfoResponse) -> str:
    """Return what outputs of a seed depend on: the weights of the verify model."""
    weights = info.verify_model.weights_fingerprint[:12]
    return f"amusd-{info.version}-{weights}" if weights else f"amusd-{info.version}"


class OpenAIAnswer:
    """The answer to a job, as a stream of events or as one object."""

    def __init__(
        self,
        make_format: Callable[[Job], AnswerFormat],
        job: Job,
        names: Sequence[str],
        info: orchestrator_pb2.GetServerInfoResponse,
    ) -> None:
        """Write the answer of ``job``, with the choices that ``make_format`` formats."""
        self.job = job
        self.usage = Usage(job.num_choices, job.echo_only)
        self._format = make_format(job)
        self._envelope = Envelope(
            self._format.id_prefix + uuid.uuid4().hex,
            int(time.time()),
            job.model or names[0],
            _fingerprint(info),
        )

    async def write(
        self, messages: AsyncIterator[Numbered], exchange: Exchange, record: RequestRecord
    ) -> None:
        """Send the answer."""
        if self.job.stream:
            await self._stream(messages, exchange, record)
        else:
            await exchange.send_json(200, await self._whole(messages, record))

    async def _stream(
        self, messages: AsyncIterator[Numbered], exchange: Exchange, record: RequestRecord
    ) -> None:
        """Send the choices as they come, then the usage if it is asked for."""
        async for prompt, response in messages:
            record.answered()
            if response.HasField("chunk"):
                choices = self._format.piece(prompt, response.chunk)
            else:
                self.usage.add(prompt, response.completion.statistics)
                choices = self._format.end(prompt, response.completion)
            if choices:
                if not exchange.has_begun:
                    await exchange.begin_events()
                await exchange.send_events(self._events(choices))
        if self.job.include_usage:
            last = self._envelope.around(self._format.chunk_kind, [])
            await exchange.send_events([{**last, "usage": self.usage.fields(), **self._metrics()}])
        await exchange.send_bytes(DONE, more=False)

    async def _whole(
        self, messages: AsyncIterator[Numbered], record: RequestRecord
    ) -> dict[str, Any]:
        """Return the answer as one object."""
        choices = []
        async for prompt, response in messages:
            record.answered()
            if response.HasField("chunk"):
                self._format.keep(prompt, response.chunk)
            else:
                self.usage.add(prompt, response.completion.statistics)
                choices.append(self._format.whole(prompt, response.completion))
        choices.sort(key=lambda choice: int(choice["index"]))
        whole = self._envelope.around(self._format.whole_kind, choices)
        return {**whole, "usage": self.usage.fields(), **self._metrics()}

    def _events(self, choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
        kind = self._format.chunk_kind
        events = [self._envelope.around(kind, [choice]) for choice in choices]
        if self.job.include_usage:
            for event in events:
                event["usage"] = None
        elif choices[-1]["finish_reason"] is not None:
            events[-1] |= self._metrics()
        return events

    def _metrics(self) -> dict[str, Any]:
        metrics = self.usage.metrics()
        return {} if metrics is None else {"metrics": metrics}
