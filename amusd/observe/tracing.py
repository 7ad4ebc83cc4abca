"""Traces through OpenTelemetry: one span per session, with its context in gRPC metadata.

OpenTelemetry is imported only when a ``Tracing`` is created. Spans wait in a bounded queue, and a
separate thread exports them. Spans that find the queue full are dropped.
"""

import logging
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import amusd
from amusd.protocol.errors import InvalidInputError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.trace import Span

log = logging.getLogger(__name__)

_MAX_SPANS_WAITING = 2048
_EXPORT_SECONDS = 5.0
_FLUSH_SECONDS = 2.0
_PROPAGATED = ("traceparent", "tracestate")

Metadata = Iterable[tuple[str, str | bytes]]


class Tracing:
    """Creates the spans of one service and sends them to a collector."""

    def __init__(self, endpoint: str, role: str) -> None:
        """Send to the OTLP collector at ``endpoint`` by gRPC; it may be unreachable.

        Raises:
            InvalidInputError: OpenTelemetry is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415
                OTLPSpanExporter,
            )
            from opentelemetry.sdk.resources import (  # noqa: PLC0415
                OTELResourceDetector,
                Resource,
            )
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
            from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415
                TraceContextTextMapPropagator,
            )
        except ImportError as error:
            raise InvalidInputError(
                f"OTEL_EXPORTER_OTLP_ENDPOINT is set, but OpenTelemetry is missing ({error}): "
                "install amusd[traces], or unset the variable"
            ) from None
        # The exporter logs every failure; _Exporter logs an outage once.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        service = Resource({"service.name": f"amusd-{role}", "service.version": amusd.__version__})
        # A collector with TLS may be outside the cluster, where a proxy of the environment leads.
        direct = (("grpc.enable_http_proxy", 0),) if endpoint.startswith("http://") else None
        self._exporter = _Exporter(
            OTLPSpanExporter(
                endpoint=endpoint,
                timeout=_EXPORT_SECONDS,
                channel_options=direct,  # type: ignore[arg-type]  # gRPC takes this one as a number
            ),
            endpoint,
        )
        self._provider = TracerProvider(
            resource=service.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(self._exporter, max_queue_size=_MAX_SPANS_WAITING)  # type: ignore[arg-type]
        )
        self._tracer = self._provider.get_tracer("amusd", amusd.__version__)
        self._propagator = TraceContextTextMapPropagator()

    def start_span(self, name: str, metadata: Metadata) -> "Span":
        """Start a child of the span that a call's ``metadata`` names, or a new trace."""
        from opentelemetry.context import Context  # noqa: PLC0415
        from opentelemetry.trace import SpanKind  # noqa: PLC0415

        carrier = {key: value for key, value in metadata if key in _PROPAGATED}
        # An empty context, so that no other span of this process becomes the parent.
        context = self._propagator.extract(carrier, Context())
        return self._tracer.start_span(name, context, SpanKind.SERVER)

    def metadata_of(self, span: "Span") -> tuple[tuple[str, str], ...]:
        """Return metadata that makes a call's span a child of ``span``."""
        from opentelemetry.trace import set_span_in_context  # noqa: PLC0415

        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        return tuple(carrier.items())

    def close(self) -> None:
        """Send the remaining spans, for at most two seconds, and stop."""
        flushing = threading.Thread(target=self._provider.shutdown, daemon=True)
        flushing.start()
        flushing.join(_FLUSH_SECONDS)
        self._exporter.shutdown()  # ends an export that still retries


class _Exporter:
    """An exporter that logs once that the collector cannot be reached."""

    def __init__(self, exporter: "SpanExporter", endpoint: str) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._is_lost = False
        self._is_closed = False

    def export(self, spans: "Sequence[ReadableSpan]") -> "SpanExportResult":
        """Send spans; called on the span processor's thread."""
        result = self._exporter.export(spans)
        is_lost = result.name != "SUCCESS"
        if is_lost and not self._is_lost:
            log.warning(
                "no trace collector at %s (OTEL_EXPORTER_OTLP_ENDPOINT): spans are dropped until "
                "there is one",
                self._endpoint,
            )
        self._is_lost = self._is_lost or is_lost
        return result

    def shutdown(self) -> None:
        """Stop exporting."""
        if not self._is_closed:
            self._is_closed = True
            self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Do nothing: the exporter buffers no spans."""
        return True


def attributes_of(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a session's counts as span attributes."""
    return {f"amusd.{name}": value for name, value in fields.items()}
