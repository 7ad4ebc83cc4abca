"""An orchestrator on loopback in this process, with a verify service that a test controls."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc.aio

from amusd.observe.observer import Observer
from amusd.protocol.strategy import Strategy
from amusd.rpc.channel import SERVER_OPTIONS
from amusd.rpc.faults import Context
from amusd.v1 import orchestrator_pb2_grpc, verify_pb2
from orchestrator.orchestrator_servicer import OrchestratorServicer
from orchestrator.orchestrator_settings import OrchestratorSettings
from orchestrator.text import NoText, TextCodec
from tests.orchestrator.replicas import FakeVerify
from tests.orchestrator.running_backends import Serve, running


@dataclass
class CountingVerify(FakeVerify):
    """Counts the sessions that are open."""

    num_open: int = 0

    async def Verify(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[verify_pb2.VerifyRequest], context: Context
    ) -> None:
        self.num_open += 1
        try:
            await super().Verify(request_iterator, context)
        finally:
            self.num_open -= 1


@asynccontextmanager
async def served_orchestrator(
    serve: Serve, verify: FakeVerify, text: TextCodec | None = None
) -> AsyncIterator[str]:
    """Serve an orchestrator whose only verify replica is ``verify``; yield its address."""
    settings = OrchestratorSettings(default_strategy=Strategy.AUTOREGRESSIVE)
    servicer = OrchestratorServicer(settings, Observer("orchestrator"))
    server = grpc.aio.server(options=SERVER_OPTIONS)
    orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    async with running(await serve(verify)) as backends:
        await backends.connect(10)
        servicer.open(backends, text or NoText())
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(0)
