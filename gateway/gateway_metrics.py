"""Metrics of the gateway: HTTP requests, their status and their times. Those of decoding are the
orchestrator's.
"""

import contextlib
import time
from collections.abc import Iterator

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

_FIRST_BUCKETS = (
    0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0,
)  # fmt: skip
_REQUEST_BUCKETS = (
    0.01,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
)
_LEFT_STATUS = 499  # as nginx counts clients that leave


class RequestRecord:
    """What happens to one request."""

    def __init__(self, metrics: "GatewayMetrics", endpoint: str) -> None:
        """Start when the request arrives."""
        self.status = 500
        self._metrics = metrics
        self._endpoint = endpoint
        self._started = time.monotonic()
        self._has_answer = False

    @property
    def seconds(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self._started

    def answered(self) -> None:
        """Record that the first message of the output came; without effect on later ones."""
        if not self._has_answer:
            self._has_answer = True
            self._metrics.first.labels(self._endpoint).observe(self.seconds)

    def left(self) -> None:
        """Record that the client left."""
        self.status = _LEFT_STATUS


class GatewayMetrics:
    """The counters and histograms of a gateway, in a registry of their own."""

    def __init__(self) -> None:
        """Create all metrics at 0."""
        # Otherwise each counter gets a second series with its creation time.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "amusd_gateway_requests_total",
            "HTTP requests that have ended, by endpoint and status; 499: the client left.",
            ("endpoint", "status"),
            registry=self.registry,
        )
        self._running = Gauge(
            "amusd_gateway_requests_running", "HTTP requests that are open.", registry=self.registry
        )
        self._seconds = Histogram(
            "amusd_gateway_request_seconds",
            "Time from the arrival of an HTTP request to its end.",
            ("endpoint",),
            registry=self.registry,
            buckets=_REQUEST_BUCKETS,
        )
        self.first = Histogram(
            "amusd_gateway_time_to_first_token_seconds",
            "Time from the arrival of an HTTP request to the first message of its output.",
            ("endpoint",),
            registry=self.registry,
            buckets=_FIRST_BUCKETS,
        )

    @contextlib.contextmanager
    def request(self, endpoint: str) -> Iterator[RequestRecord]:
        """Record a request from its arrival to its end."""
        record = RequestRecord(self, endpoint)
        self._running.inc()
        try:
            yield record
        finally:
            self._running.dec()
            self._requests.labels(endpoint, record.status).inc()
            self._seconds.labels(endpoint).observe(record.seconds)
