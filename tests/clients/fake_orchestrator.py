"""An orchestrator on loopback in this process that answers as a test tells it."""

import contextlib
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from amusd.v1 import orchestrator_pb2 as pb
from amusd.v1 import orchestrator_pb2_grpc


def chunk(text: str, *tokens: int, index: int = 0) -> pb.GenerateResponse:
    return pb.GenerateResponse(chunk=pb.Chunk(text=text, token_ids=tokens, index=index))


def completion(index: int = 0, seed: int = 7, text: str = "") -> pb.GenerateResponse:
    statistics = pb.Statistics(num_output_tokens=3, num_passes=2, wall_seconds=0.5)
    return pb.GenerateResponse(
        completion=pb.Completion(
            finish_reason=pb.FINISH_REASON_STOP,
            text=text,
            index=index,
            seed=seed,
            statistics=statistics,
        )
    )


@dataclass
class FakeOrchestrator(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """Answers with ``responses``, after it refused as often as there are ``refusals``.

    After ``num_free`` responses it waits until the call ends, or ``may_go_on`` is set.
    """

    responses: list[pb.GenerateResponse]
    refusals: list[grpc.StatusCode] = field(default_factory=list)
    last_status: grpc.StatusCode | None = None
    num_free: int | None = None
    may_go_on: threading.Event = field(default_factory=threading.Event)
    arrived: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    metadata: list[Mapping[str, object]] = field(default_factory=list)

    def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        if self.refusals:
            context.abort(self.refusals.pop(0), "not now")
        context.add_callback(self._end)
        self.arrived.set()
        for number, response in enumerate(self.responses):
            if number == self.num_free:
                self.may_go_on.wait(10)
            yield response
        if self.last_status is not None:
            context.abort(self.last_status, "broken off")

    def GetServerInfo(  # noqa: N802
        self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetServerInfoResponse:
        self.metadata.append(dict(context.invocation_metadata()))
        return pb.GetServerInfoResponse(version="test")

    def _end(self) -> None:
        self.ended.set()
        self.may_go_on.set()


@contextlib.contextmanager
def serving(
    servicer: orchestrator_pb2_grpc.OrchestratorServiceServicer,
    credentials: grpc.ServerCredentials | None = None,
) -> Iterator[str]:
    """Serve it for the block; yield its address."""
    server = grpc.server(ThreadPoolExecutor(8))
    orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(servicer, server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Write a key and its own certificate for loopback, as PEM files; skip without openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key, chain = folder / "key.pem", folder / "chain.pem"
    _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(key))
    _openssl(
        "req", "-x509", "-new", "-key", str(key), "-out", str(chain), "-days", "1",
        "-subj", "/CN=loopback", "-addext", "subjectAltName=IP:127.0.0.1",
    )  # fmt: skip
    return key, chain


def _openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True, timeout=60)
