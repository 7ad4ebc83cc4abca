"""Traces of real processes: one trace for a generation, a span in each service."""

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from amusd.client import Client, Generation, Options
from amusd.prompts import Prompt
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.strategy import Strategy
from amusd.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from tests.process.collector import Collector, attributes, collecting
from tests.process.scrape import free_port
from tests.process.services import Service, Starter, Trio, becomes_true, start_trio

pytestmark = pytest.mark.process

MARKER = "a marker that no trace may contain"
SERVICES = ("amusd-orchestrator", "amusd-draft", "amusd-verify")


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collecting() as running:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", running.endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        yield running


def generate(trio: Trio, prompt: Prompt, options: Options) -> Generation:
    with Client(trio.orchestrator.address, timeout_seconds=60) as client:
        return client.generate(prompt, options).wait()


def events(span: Span) -> list[str]:
    return [event.name for event in span.events]


def test_one_trace_has_a_span_of_each_service_below_the_orchestrators(
    start: Starter, collector: Collector
) -> None:
    trio = start_trio(start)
    options = Options(Strategy.AMUSD, 30)
    generation = generate(trio, Prompt(text=MARKER), options)
    assert becomes_true(lambda: set(collector.spans()) == set(SERVICES))
    [root], [draft], [verify] = (collector.spans()[service] for service in SERVICES)
    assert root.trace_id == draft.trace_id == verify.trace_id
    assert (root.parent_span_id, draft.parent_span_id) == (b"", root.span_id)
    assert verify.parent_span_id == root.span_id
    summary = generation.summary()
    said = attributes(root)
    assert said["amusd.strategy"] == "amusd"
    assert said["amusd.tokens"] == 30
    assert said["amusd.prompt_tokens"] == len(MARKER)
    assert said["amusd.passes"] == summary.num_passes
    assert said["amusd.drafted"] == summary.num_drafted
    assert events(root).count("rollback") == summary.num_rollbacks > 0
    assert events(draft).count("rollback") > 0
    assert attributes(draft)["amusd.session"] == said["amusd.session"]
    assert attributes(verify)["amusd.session"] == said["amusd.session"]
    assert MARKER not in collector.everything()
    assert generation.text not in collector.everything()


def test_a_trace_of_the_client_is_continued(start: Starter, collector: Collector) -> None:
    trio = start_trio(start)
    parent = ("traceparent", f"00-{'ab' * 16}-{'cd' * 8}-01")
    request = orchestrator_pb2.GenerateRequest(
        tokens=orchestrator_pb2.TokenIds(ids=[1, 2]), max_tokens=3
    )
    with trio.orchestrator.channel() as channel:
        stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
        assert list(stub.Generate(request, metadata=(parent,), timeout=30))
    assert becomes_true(lambda: set(collector.spans()) == set(SERVICES))
    [root] = collector.spans()["amusd-orchestrator"]
    assert root.trace_id.hex() == "ab" * 16
    assert root.parent_span_id.hex() == "cd" * 8


def test_a_lost_draft_is_an_event_and_a_refusal_an_error(
    start: Starter, collector: Collector
) -> None:
    trio = start_trio(start)
    with Client(trio.orchestrator.address, timeout_seconds=60) as client:
        running = client.generate(Prompt(tokens=(1, 2)), Options(Strategy.AMUSD, 300))
        pieces = iter(running)
        next(pieces)
        trio.draft.process.kill()
        for _ in pieces:
            pass
        with pytest.raises(InvalidInputError):
            client.generate(Prompt(tokens=(999_999,))).wait()
    assert running.summary().fallback_reason
    assert becomes_true(lambda: len(collector.spans().get("amusd-orchestrator", [])) == 2)
    fallen, refused = collector.spans()["amusd-orchestrator"]
    assert "fallback" in events(fallen)
    assert attributes(fallen)["amusd.fallback"] == "UNAVAILABLE"
    assert refused.status.code == Status.STATUS_CODE_ERROR
    assert refused.status.message == "INVALID_ARGUMENT"
    assert "999999" not in collector.everything()


def test_a_missing_collector_costs_one_warning(
    start: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    trio = start_trio(start)
    for _ in range(3):
        assert len(generate(trio, Prompt(tokens=(1, 2)), Options(max_tokens=5)).tokens) == 5
    assert becomes_true(lambda: bool(warnings_of(trio.verify)))
    started = time.monotonic()
    for service in (trio.orchestrator, trio.draft, trio.verify):
        service.end()
        assert service.process.returncode == 0
    assert time.monotonic() - started < 12
    for service in (trio.orchestrator, trio.draft, trio.verify):
        assert len(warnings_of(service)) <= 1


def warnings_of(service: Service) -> list[str]:
    """Return the lines of a service's log above the level INFO."""
    lines = service.log.read_text().splitlines()
    return [line for line in lines if " INFO " not in line]


def test_nothing_of_opentelemetry_is_imported_when_traces_are_off() -> None:
    code = (
        "import sys, amusd.cli.app\n"
        "from amusd.observe.observer import ObservationSettings, observing\n"
        "with observing('verify', ObservationSettings()):\n"
        "    assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_without_opentelemetry_the_variable_is_refused_with_advice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = (
        "import sys\n"
        "sys.modules['opentelemetry.exporter.otlp.proto.grpc.trace_exporter'] = None\n"
        "sys.argv = ['amusd', 'serve', 'verify', '--model', 'synthetic', '--port', '0']\n"
        "from amusd.cli import main\n"
        "main()\n"
    )
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 1
    assert "amusd[traces]" in result.stderr
    assert len(result.stderr.splitlines()) == 1
