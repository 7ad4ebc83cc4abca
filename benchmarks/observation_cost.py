"""What metrics and traces cost: services with both against services with neither.

Both sets of services run at once. Every prompt goes through both, and each set is first equally
often, so that other load on the machine affects both. Run it on an idle machine:
``python benchmarks/observation_cost.py --output observation.json``.
"""

import contextlib
import json
import socket
import statistics
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from amusd.cli import reporting_errors
from amusd.cli.common_options import check_output
from amusd.cli.local_services import LocalSettings, local_services
from amusd.cli.measure import ServiceRunner, measure
from amusd.client import Client
from amusd.observe.metrics import Metrics
from amusd.observe.observer import Observer, RequestWatch
from amusd.observe.pass_listener import PassReport
from amusd.prompts import Prompt
from amusd.protocol.events import Verdict
from amusd.protocol.strategy import Strategy

SYNTHETIC = ("synthetic:pass_ms=2", "synthetic:pass_ms=0.5,agreement=0.8")
EMBEDDED = ("smollm2", "smollm2")
_SCRAPE_SECONDS = 5.0


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """A collector that counts spans and drops them."""

    num_spans = 0

    def Export(  # noqa: N802  # named by the protocol
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Count the spans of a request."""
        for resource in request.resource_spans:
            self.num_spans += sum(len(scope.spans) for scope in resource.scope_spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@contextlib.contextmanager
def collector() -> Iterator[tuple[Collector, str]]:
    """Run a trace collector on a free port; yield it and its address."""
    found = Collector()
    server = grpc.server(ThreadPoolExecutor(1))
    add_servicer: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server  # untyped
    add_servicer(found, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield found, f"http://127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


@contextlib.contextmanager
def scraping(ports: tuple[int, int, int]) -> Iterator[None]:
    """Scrape the services every few seconds, as Prometheus does."""
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(_SCRAPE_SECONDS):
            for port in ports:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as got:
                    got.read()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@dataclass(frozen=True, slots=True)
class Cost:
    """Time per token with observation over time without, pair by pair."""

    ratios: tuple[float, ...]
    ms_per_token: tuple[float, float]  # off, on
    num_spans: int

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the ratios."""
        low, median, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return low, median, high

    def report(self) -> dict[str, Any]:
        """Return the figures for a file."""
        off, on = self.ms_per_token
        return {
            "ratio_quartiles": self.quartiles,
            "ratio_of_sums": on / off,
            "ms_per_token_off": off,
            "ms_per_token_on": on,
            "ratios": self.ratios,
            "num_spans": self.num_spans,
        }


def services_cost(
    models: tuple[str, str], strategy: Strategy, num_pairs: int, max_tokens: int
) -> Cost:
    """Measure one strategy on ``models``, the verify and the draft model."""
    off = LocalSettings(verify=models[0], draft=models[1], traces_endpoint="")
    ports = _free_ports()
    prompts = [Prompt(tokens=tuple(range(start, start + 20))) for start in range(num_pairs)]
    with contextlib.ExitStack() as stack:
        spans, endpoint = stack.enter_context(collector())
        on = replace(off, metrics_ports=ports, traces_endpoint=endpoint)
        addresses = [stack.enter_context(local_services(one)).address for one in (off, on)]
        clients = [stack.enter_context(Client(address)) for address in addresses]
        stack.enter_context(scraping(ports))
        runners = [
            ServiceRunner(client, name, strategy, ignore_eos=True)
            for client, name in zip(clients, ("off", "on"), strict=True)
        ]
        without, watched = measure(runners, prompts, max_tokens)
    pairs = zip(watched.samples, without.samples, strict=True)
    return Cost(
        tuple(one.ms_per_token / other.ms_per_token for one, other in pairs),
        (without.ms_per_token, watched.ms_per_token),
        spans.num_spans,
    )


def microseconds(call: Callable[[], object], repeats: int = 20_000) -> float:
    """Return the time of one call in microseconds: the best of five rounds."""
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        best = min(best, time.perf_counter() - started)
    return 1e6 * best / repeats


def recording_cost() -> dict[str, float]:
    """Return what observation adds to a pass (engine thread) and to a verdict (event loop)."""
    metrics = Metrics("verify")
    watch = RequestWatch(Observer("verify", metrics))
    verdict = Verdict(epoch=0, position=0, num_checked=4, num_accepted=4, next_token=0)
    return {
        "pass_us": microseconds(lambda: metrics.passed(PassReport(0.002, 8, 8))),
        "verdict_us": microseconds(lambda: watch.verified(verdict)),
    }


def main(
    num_pairs: Annotated[
        int, typer.Option(min=2, help="Outputs with and without observation.")
    ] = 40,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each output.")] = 200,
    embedded: Annotated[bool, typer.Option(help="Also measure the embedded models.")] = True,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure each strategy and pair of models and print the ratios."""
    check_output(output)
    report: dict[str, Any] = {"recording": recording_cost(), "services": {}}
    print("recording: " + ", ".join(f"{k} {v:.2f}" for k, v in report["recording"].items()))
    for models in (SYNTHETIC, EMBEDDED) if embedded else (SYNTHETIC,):
        for strategy in (Strategy.AUTOREGRESSIVE, Strategy.AMUSD):
            cost = services_cost(models, strategy, num_pairs, max_tokens)
            report["services"][f"{models[0]} {strategy.value}"] = cost.report()
            low, median, high = cost.quartiles
            print(
                f"{models[0]}, {strategy.value}: on / off median {median:.4f}, quartiles "
                f"{low:.4f} to {high:.4f}, {cost.num_spans} spans",
                flush=True,
            )
    if output is not None:
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _free_ports() -> tuple[int, int, int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        first, second, third = (one.getsockname()[1] for one in sockets)
        return first, second, third


if __name__ == "__main__":
    reporting_errors(lambda: typer.run(main))
