"""What the gateway costs: a streamed completion over HTTP against the same call over gRPC.

Both go to the same orchestrator, which writes a chunk every few milliseconds and no model. Each
chunk carries the time at which it was written, so its way to the client is measured on one clock.
The calls alternate. Run it on an idle machine: ``python -m benchmarks.gateway_cost``.
"""

import asyncio
import contextlib
import json
import multiprocessing
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import grpc
import grpc.aio
import typer

from amusd.rpc.channel import SERVER_OPTIONS
from amusd.rpc.faults import Context
from amusd.rpc.time_slices import shorten_time_slices
from amusd.v1 import model_pb2, orchestrator_pb2, orchestrator_pb2_grpc

_START_SECONDS = 30.0


class ClockOrchestrator(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """Writes chunks whose text is the time at which they were written."""

    def __init__(self, interval_seconds: float) -> None:
        """Wait ``interval_seconds`` before each chunk but the first."""
        self._interval_seconds = interval_seconds

    async def Generate(  # noqa: N802
        self, request: orchestrator_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[orchestrator_pb2.GenerateResponse]:
        """Write as many chunks as the request asks for tokens."""
        for number in range(request.max_tokens):
            if number:
                await asyncio.sleep(self._interval_seconds)
            chunk = orchestrator_pb2.Chunk(token_ids=[number], text=f"{time.monotonic_ns()} ")
            yield orchestrator_pb2.GenerateResponse(chunk=chunk)
        yield orchestrator_pb2.GenerateResponse(
            completion=orchestrator_pb2.Completion(
                finish_reason=orchestrator_pb2.FINISH_REASON_LENGTH
            )
        )

    async def GetServerInfo(  # noqa: N802
        self, request: orchestrator_pb2.GetServerInfoRequest, context: Context
    ) -> orchestrator_pb2.GetServerInfoResponse:
        """Name a model."""
        model = model_pb2.ModelInfo(name="clock")
        return orchestrator_pb2.GetServerInfoResponse(version="0", verify_model=model)


@dataclass
class Ways:
    """Milliseconds of one way to the orchestrator: of each chunk, and of each first chunk."""

    chunk_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)

    def record(self, started_ns: int, arrivals: list[tuple[int, int]]) -> None:
        """Record a call by the times at which its chunks were written and arrived."""
        self.first_ms.append((arrivals[0][1] - started_ns) / 1e6)
        self.chunk_ms += [(arrived - written) / 1e6 for written, arrived in arrivals[1:]]


@contextlib.contextmanager
def clock_orchestrator(interval_seconds: float) -> Iterator[str]:
    """Run the orchestrator in a process of its own; yield its address."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(interval_seconds, theirs), daemon=True)
    process.start()
    try:
        if not ours.poll(_START_SECONDS):
            raise RuntimeError("the orchestrator did not start")
        yield f"127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def _serve(interval_seconds: float, connection: Connection) -> None:
    async def run() -> None:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        servicer = ClockOrchestrator(interval_seconds)
        orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(servicer, server)
        connection.send(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        await server.wait_for_termination()

    shorten_time_slices()
    asyncio.run(run())


@contextlib.contextmanager
def gateway(orchestrator: str) -> Iterator[str]:
    """Run ``amusd serve gateway``; yield its address."""
    flags = ["--orchestrator", orchestrator, "--port", "0", "--end-with-stdin"]
    process = subprocess.Popen(
        [sys.executable, "-m", "amusd", "serve", "gateway", *flags, "--log-level", "warning"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.communicate()


def call_grpc(
    stub: orchestrator_pb2_grpc.OrchestratorServiceStub, num_chunks: int
) -> tuple[int, list[tuple[int, int]]]:
    """Return when a call started, and when its chunks were written and arrived, in ns."""
    started, arrivals = time.monotonic_ns(), []
    request = orchestrator_pb2.GenerateRequest(text="x", max_tokens=num_chunks)
    for response in stub.Generate(request, timeout=60):
        arrived = time.monotonic_ns()
        if response.HasField("chunk"):
            arrivals.append((int(response.chunk.text), arrived))
    return started, arrivals


class HttpClient:
    """A client that does no more than it must, so that its own time is not the gateway's."""

    def __init__(self, address: str) -> None:
        """Connect to ``host:port``."""
        host, port = address.rsplit(":", 1)
        self._socket = socket.create_connection((host, int(port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb")

    def close(self) -> None:
        """Close the connection."""
        self._file.close()
        self._socket.close()

    def call(self, num_chunks: int) -> tuple[int, list[tuple[int, int]]]:
        """Return the same of a streamed completion."""
        body = json.dumps({"prompt": "x", "max_tokens": num_chunks, "stream": True}).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        started, lines = time.monotonic_ns(), []
        self._socket.sendall(head.encode() + body)
        while (line := self._file.readline()) not in (b"0\r\n", b""):  # the last chunk of HTTP
            if line.startswith(b"data: {"):
                lines.append((line, time.monotonic_ns()))
        self._file.readline()
        texts = [json.loads(line[6:])["choices"][0]["text"] for line, _ in lines]
        times = [arrived for _, arrived in lines]
        return started, [(int(text), one) for text, one in zip(texts, times, strict=True) if text]


def measure(num_calls: int, num_chunks: int, interval_ms: float) -> dict[str, Ways]:
    """Alternate calls over both ways."""
    ways = {"grpc": Ways(), "http": Ways()}
    with (
        clock_orchestrator(interval_ms / 1e3) as orchestrator,
        gateway(orchestrator) as address,
        grpc.insecure_channel(orchestrator) as channel,
        contextlib.closing(HttpClient(address)) as client,
    ):
        stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
        calls: dict[str, Callable[[], tuple[int, list[tuple[int, int]]]]] = {
            "grpc": lambda: call_grpc(stub, num_chunks),
            "http": lambda: client.call(num_chunks),
        }
        for call in calls.values():
            call()  # connects
        for number in range(num_calls):
            for name in ("grpc", "http") if number % 2 else ("http", "grpc"):
                ways[name].record(*calls[name]())
    return ways


def report(ways: dict[str, Ways]) -> dict[str, Any]:
    """Return the medians of both ways, and their differences, in ms."""
    found: dict[str, Any] = {}
    for kind in ("chunk_ms", "first_ms"):
        values = {name: getattr(way, kind) for name, way in ways.items()}
        medians = {name: statistics.median(one) for name, one in values.items()}
        quartiles = {name: statistics.quantiles(one, n=4) for name, one in values.items()}
        found[kind] = {
            "median": medians,
            "quartiles": {name: [one[0], one[2]] for name, one in quartiles.items()},
            "added": medians["http"] - medians["grpc"],
        }
    return found


def main(
    num_calls: Annotated[int, typer.Option(min=2, help="Calls over each way.")] = 20,
    num_chunks: Annotated[int, typer.Option(min=2, help="Chunks of a call.")] = 50,
    interval_ms: Annotated[float, typer.Option(min=0.0, help="Time between chunks.")] = 10.0,
    output: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print what the gateway adds to a chunk and to the first one."""
    found = report(measure(num_calls, num_chunks, interval_ms))
    for kind, title in (("chunk_ms", "a chunk"), ("first_ms", "the first chunk")):
        one = found[kind]
        print(
            f"{title}: gRPC {one['median']['grpc']:.2f} ms, HTTP {one['median']['http']:.2f} ms, "
            f"added {one['added']:.2f} ms"
        )
    if output is not None:
        output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
