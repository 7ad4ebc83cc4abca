"""A gateway on loopback in this process, before an orchestrator that a test scripts."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from amusd.fleet.endpoint import Endpoint
from amusd.rpc.channel import SERVER_OPTIONS
from amusd.rpc.faults import Context
from amusd.rpc.listening import bind_all
from amusd.v1 import model_pb2, orchestrator_pb2, orchestrator_pb2_grpc, sampling_pb2
from gateway.application import make_application
from gateway.gateway_metrics import GatewayMetrics
from gateway.gateway_settings import GatewaySettings
from gateway.http_admission import Admission
from gateway.http_server import HttpServer, port_of
from gateway.orchestrator_client import OrchestratorClient

MODEL = "test-model"

Response = orchestrator_pb2.GenerateResponse
Request = orchestrator_pb2.GenerateRequest
Script = Callable[[Request], Iterable[Response]]


def chunk(
    text: str,
    tokens: Iterable[int] = (1,),
    index: int = 0,
    logprobs: Iterable[sampling_pb2.PositionLogprobs] = (),
    prompt_logprobs: Iterable[sampling_pb2.PositionLogprobs] = (),
) -> Response:
    return Response(
        chunk=orchestrator_pb2.Chunk(
            token_ids=tokens,
            text=text,
            index=index,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
    )


def completion(
    index: int = 0,
    text: str = "",
    reason: orchestrator_pb2.FinishReason.ValueType = orchestrator_pb2.FINISH_REASON_STOP,
    statistics: orchestrator_pb2.Statistics | None = None,
    **fields: Any,
) -> Response:
    if statistics is None:
        statistics = orchestrator_pb2.Statistics(
            num_prompt_tokens=3,
            num_output_tokens=2,
            num_drafted=4,
            strategy=orchestrator_pb2.STRATEGY_AMUSD,
            acceptance_per_position=[
                orchestrator_pb2.PositionAcceptance(num_checked=2, num_accepted=1)
            ],
        )
    return Response(
        completion=orchestrator_pb2.Completion(
            finish_reason=reason, text=text, index=index, statistics=statistics, **fields
        )
    )


def said(*texts: str) -> Script:
    """Return a script that answers every request with these chunks."""
    return lambda request: [*(chunk(text) for text in texts), completion()]


def position(
    text: bytes, logprob: float, *top: tuple[bytes, float]
) -> sampling_pb2.PositionLogprobs:
    return sampling_pb2.PositionLogprobs(
        token=sampling_pb2.TokenLogprob(text=text, logprob=logprob),
        top=[sampling_pb2.TokenLogprob(text=one, logprob=value) for one, value in top],
    )


@dataclass
class ScriptedOrchestrator(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """Answers by ``script``, then with ``status`` if it is set; with ``hangs`` it never ends."""

    script: Script = field(default_factory=lambda: said("Hello", " world"))
    status: grpc.StatusCode | None = None
    details: str = ""
    hangs: bool = False
    requests: list[Request] = field(default_factory=list)
    num_open: int = 0
    most_open: int = 0
    has_ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def Generate(  # noqa: N802
        self, request: Request, context: Context
    ) -> AsyncIterator[Response]:
        self.requests.append(request)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            for response in self.script(request):
                yield response
                await asyncio.sleep(0)
            if self.hangs:
                await asyncio.Event().wait()
            if self.status is not None:
                await context.abort(self.status, self.details)
        finally:
            self.num_open -= 1
            self.has_ended.set()

    async def GetServerInfo(  # noqa: N802
        self, request: orchestrator_pb2.GetServerInfoRequest, context: Context
    ) -> orchestrator_pb2.GetServerInfoResponse:
        return orchestrator_pb2.GetServerInfoResponse(
            version="0.1.0",
            verify_model=model_pb2.ModelInfo(name=MODEL, weights_fingerprint="ab" * 16),
            limits=model_pb2.ServiceLimits(max_context=600),
        )


@dataclass(frozen=True)
class ServedGateway:
    """A running gateway: its address, its parts, and the orchestrator behind it."""

    url: str
    orchestrator: ScriptedOrchestrator
    admission: Admission


@asynccontextmanager
async def served_gateway(
    orchestrator: ScriptedOrchestrator | None = None,
    orchestrator_is_away: bool = False,
    **changes: object,
) -> AsyncIterator[ServedGateway]:
    """Serve a gateway whose settings have ``changes``."""
    script = orchestrator or ScriptedOrchestrator()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(script, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    if orchestrator_is_away:
        await server.stop(0)
    settings = dataclasses.replace(GatewaySettings(orchestrator=address), **changes)  # type: ignore[arg-type]
    client = OrchestratorClient(address, False, settings.request_timeout_seconds)
    admission = Admission(settings.max_requests)
    application = make_application(client, settings, admission, GatewayMetrics())
    bound = bind_all(Endpoint("127.0.0.1", 0))
    http = HttpServer(application, bound)
    serving = asyncio.create_task(http.serve())
    try:
        yield ServedGateway(f"http://127.0.0.1:{port_of(bound)}", script, admission)
    finally:
        admission.cut_off("the test is over")
        http.end()
        await serving
        await client.close()
        await server.stop(0)


async def becomes_true(condition: Any, within_seconds: float = 5.0) -> None:
    end = time.monotonic() + within_seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)
