"""An OTLP collector in this process: it keeps all traces that it receives."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps all spans by the name of the service that sent them."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.requests: list[trace_service_pb2.ExportTraceServiceRequest] = []
        self._lock = threading.Lock()

    def Export(  # noqa: N802  # named by the protocol
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        with self._lock:
            self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self) -> dict[str, list[Span]]:
        found: dict[str, list[Span]] = {}
        with self._lock:
            for request in self.requests:
                for resource in request.resource_spans:
                    service = next(
                        one.value.string_value
                        for one in resource.resource.attributes
                        if one.key == "service.name"
                    )
                    for scope in resource.scope_spans:
                        found.setdefault(service, []).extend(scope.spans)
        return found

    def everything(self) -> str:
        """Return all that was sent, as text."""
        with self._lock:
            return "\n".join(str(request) for request in self.requests)


@contextmanager
def collecting(address: str = "127.0.0.1:0") -> Iterator[Collector]:
    """Run a collector on loopback."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    add_servicer: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server  # untyped
    add_servicer(collector, server)
    port = server.add_insecure_port(address)
    collector.endpoint = f"http://127.0.0.1:{port}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(0).wait()


def attributes(span: Span) -> dict[str, str | int]:
    """Return a span's attributes, strings and whole numbers alike."""
    return {
        one.key: one.value.string_value or one.value.int_value
        for one in span.attributes
        if one.value.WhichOneof("value") in ("string_value", "int_value")
    }
