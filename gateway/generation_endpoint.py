"""The endpoints that generate: one request from its body to the end of its answer."""

import contextlib
import logging
import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from amusd.v1 import orchestrator_pb2
from gateway import api_errors
from gateway.api_errors import ApiError
from gateway.gateway_metrics import GatewayMetrics, RequestRecord
from gateway.gateway_settings import GatewaySettings
from gateway.generation_calls import Numbered, responses
from gateway.http_admission import Admission
from gateway.http_io import DONE, ClientLeftError, Exchange, header, read_json
from gateway.job import Job
from gateway.orchestrator_client import OrchestratorClient
from gateway.request_fields import Fields
from gateway.usage import Usage

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Answer(Protocol):
    """Writes the answer to a job."""

    job: Job
    usage: Usage

    async def write(
        self, messages: AsyncIterator[Numbered], exchange: Exchange, record: RequestRecord
    ) -> None:
        """Send the answer, from the messages of the orchestrator; ``record`` hears of each."""


MakeAnswer = Callable[[Job, Sequence[str], orchestrator_pb2.GetServerInfoResponse], Answer]
"""Makes the answer to a job, for a model of these names."""

Translate = Callable[[Fields, Iterable[str], float], Job]
"""Makes a job of a request, the names of the model, and the default temperature."""


def model_names(
    settings: GatewaySettings, info: orchestrator_pb2.GetServerInfoResponse
) -> tuple[str, ...]:
    """Return the names of the model, 1 or more; the first one is in answers."""
    return settings.model_names or (info.verify_model.name,)


class GenerationEndpoint:
    """An ASGI application for one endpoint."""

    def __init__(
        self,
        name: str,
        translate: Translate,
        make_answer: MakeAnswer,
        orchestrator: OrchestratorClient,
        settings: GatewaySettings,
        admission: Admission,
        metrics: GatewayMetrics,
    ) -> None:
        """Serve the endpoint ``name`` of the metrics."""
        self._name = name
        self._translate = translate
        self._make_answer = make_answer
        self._orchestrator = orchestrator
        self._settings = settings
        self._admission = admission
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request_id = header(scope, b"x-request-id")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        seconds = self._settings.client_write_timeout_seconds
        exchange = Exchange(scope, send, seconds, request_id)
        with self._metrics.request(self._name) as record:
            fields: dict[str, Any] = {"endpoint": self._name, "request": ascii(request_id)}
            try:
                await self._answer_or_refuse(scope, receive, exchange, record, fields)
            except ClientLeftError:
                record.left()
            finally:
                fields |= {"status": record.status, "seconds": round(record.seconds, 4)}
                log.info("request ended", extra={"fields": fields})

    async def _answer_or_refuse(
        self,
        scope: Scope,
        receive: Receive,
        exchange: Exchange,
        record: RequestRecord,
        fields: dict[str, Any],
    ) -> None:
        try:
            with self._admission.admitted():
                limit = self._settings.max_body_mib * 2**20
                request = Fields(await read_json(scope, receive, limit))
                info = await self._orchestrator.info()
                names = model_names(self._settings, info)
                job = self._translate(request, names, self._settings.default_temperature)
                if job.ignored:
                    log.debug("fields without effect: %s", ascii(", ".join(job.ignored)))
                answer = self._make_answer(job, names, info)
                work = self._run(answer, exchange, record)
                try:
                    await self._admission.run(receive, work)
                finally:
                    fields["tokens"] = answer.usage.num_output_tokens
            record.status = 200
            return
        except ApiError as problem:
            error = problem
        except ClientLeftError:
            raise
        except Exception:
            log.exception("an unexpected error ended a request")
            error = api_errors.internal()
        record.status = error.status
        await _refuse(exchange, error)

    async def _run(self, answer: Answer, exchange: Exchange, record: RequestRecord) -> None:
        messages = responses(
            self._orchestrator, answer.job.requests, self._settings.prompt_concurrency
        )
        async with contextlib.aclosing(messages):
            await answer.write(messages, exchange, record)


async def _refuse(exchange: Exchange, error: ApiError) -> None:
    """Send an error: as the answer, or as the last event of a stream that has begun."""
    if not exchange.has_begun:
        await exchange.send_json(error.status, error.body(), error.headers)
        return
    await exchange.send_events([error.body()])
    await exchange.send_bytes(DONE, more=False)
