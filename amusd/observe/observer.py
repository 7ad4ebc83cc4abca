"""Publishes the events of a service's requests to metrics, traces and the log.

The observer belongs to the service's event loop. The engine thread calls only ``on_pass`` and
``on_failed_batch``. Nothing here blocks, and nothing sees the content of a prompt or an output.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from amusd.analysis.generation_statistics import Statistics
from amusd.fleet.endpoint import Endpoint
from amusd.observe.log_format import LogFormat, current_session
from amusd.observe.logging_setup import LogLevel
from amusd.observe.metric_list import Role
from amusd.observe.metrics import Metrics, ReplicaCount
from amusd.observe.metrics_server import MetricsServer
from amusd.observe.pass_listener import OnPass, ignore_pass
from amusd.observe.tracing import Tracing, attributes_of
from amusd.protocol.errors import AmusdError
from amusd.protocol.events import Proposal, Rollback, Verdict
from amusd.rpc import faults
from amusd.settings import check_bounds, setting

if TYPE_CHECKING:
    from opentelemetry.trace import Span

log = logging.getLogger(__name__)

_SPAN_NAMES = {"orchestrator": "generate", "draft": "draft", "verify": "verify"}


@dataclass(frozen=True, slots=True)
class ObservationSettings:
    """Log, metrics and traces of a service."""

    log_level: LogLevel = setting(LogLevel.INFO, "Lowest level of the messages that are logged.")
    log_format: LogFormat = setting(
        LogFormat.TEXT, "Format of the log: text, or json with one object a line."
    )
    metrics_port: int = setting(
        0,
        "Port that serves Prometheus metrics at /metrics, on the same address; 0: no metrics.",
        at_least=0,
        at_most=65535,
    )
    traces_endpoint: str = setting(
        "",
        "OTLP collector (gRPC) for traces, such as http://host:4317; empty: no traces.",
        variable="OTEL_EXPORTER_OTLP_ENDPOINT",
    )

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_bounds(self)


class Observer:
    """Observes the requests of one service."""

    def __init__(
        self, role: Role, metrics: Metrics | None = None, tracing: Tracing | None = None
    ) -> None:
        """Publish to the log, and to ``metrics`` and ``tracing`` where they are not None."""
        self.role = role
        self.metrics = metrics
        self.tracing = tracing
        self.model_name = ""
        """The model that requests are for, once it is known."""
        self._watches: dict[str, RequestWatch] = {}

    @property
    def on_pass(self) -> OnPass:
        """The callback that records a pass."""
        return self.metrics.passed if self.metrics is not None else ignore_pass

    def on_failed_batch(self) -> None:
        """Count a batch in which a pass failed; on the engine thread."""
        if self.metrics is not None:
            self.metrics.pass_failures.inc()

    @contextlib.contextmanager
    def request(self, context: faults.Context) -> "Iterator[RequestWatch]":
        """Observe a call from its first message to its end, also if it fails."""
        span = None
        if self.tracing is not None:
            metadata = context.invocation_metadata() or ()
            span = self.tracing.start_span(_SPAN_NAMES[self.role], metadata)
        with self._observed(RequestWatch(self, span)) as watch:
            yield watch

    @contextlib.contextmanager
    def another_session(self, request: "RequestWatch") -> "Iterator[RequestWatch]":
        """Observe a further session of a request; its span is a child of the request's."""
        span = None
        if self.tracing is not None:
            span = self.tracing.start_span(_SPAN_NAMES[self.role], request.metadata or ())
        with self._observed(RequestWatch(self, span, is_request=False)) as watch:
            yield watch

    @contextlib.contextmanager
    def _observed(self, watch: "RequestWatch") -> "Iterator[RequestWatch]":
        """Observe from here to the end of the context, also if it fails."""
        try:
            yield watch
        except asyncio.CancelledError as error:
            # On draft and verify services the orchestrator ends each session by cancelling it.
            # On the orchestrator the client has gone away.
            if error.args:
                watch.fail("UNAVAILABLE")  # the service itself ends the call, and says why
            elif self.role == "orchestrator":
                watch.fail("CANCELLED")
            raise
        except Exception as error:
            watch.fail(faults.status_of(error).name)
            raise
        finally:
            self._watches.pop(watch.session_id, None)
            watch.close()

    def watch_session(self, watch: "RequestWatch") -> None:
        """Register a watch under the name of its session until its call ends."""
        self._watches[watch.session_id] = watch

    def rolled_back(self, session_id: str, rollback: Rollback) -> None:
        """Record a rollback, which arrives on another call than the session's own."""
        if self.metrics is not None:
            self.metrics.rollbacks.inc()
        watch = self._watches.get(session_id)
        if watch is not None:
            watch.count("rollbacks")
            watch.rolled_back(rollback)

    def count_replicas_by(self, count: ReplicaCount) -> None:
        """Export the numbers of replicas that ``count`` returns at each scrape."""
        if self.metrics is not None:
            self.metrics.count_replicas_by(count)


class RequestWatch:
    """Records the events of one request, or of a further session of it."""

    def __init__(
        self, observer: Observer, span: "Span | None" = None, is_request: bool = True
    ) -> None:
        """Start with a request that has arrived and has not been accepted yet.

        Without ``is_request`` it is a further session: metrics of requests do not count it.
        """
        self.session_id = ""
        self._observer = observer
        self._metrics = observer.metrics
        self._counts = self._metrics.of_request() if self._metrics is not None else None
        self._span = span
        self._is_request = is_request
        self._started = time.monotonic()
        self._first_token = self._last_token = 0.0
        self._num_first = self._num_tokens = 0  # of the first chunk, and of all
        self._status = "OK"
        self._is_open = False
        self._fields: dict[str, str | int | float] = {}

    @property
    def metadata(self) -> tuple[tuple[str, str], ...] | None:
        """Metadata for outgoing calls of this request; their spans become children of its span."""
        if self._span is None or self._observer.tracing is None:
            return None
        return self._observer.tracing.metadata_of(self._span)

    def another_session(self) -> "contextlib.AbstractContextManager[RequestWatch]":
        """Observe a further session of this request."""
        return self._observer.another_session(self)

    def opened(self, session_id: str, num_prompt: int, strategy: str = "") -> None:
        """Record that the request was accepted, with the length of its prompt."""
        self._is_open = True
        self.session_id = session_id
        current_session.set(session_id)
        if strategy:
            self._fields["strategy"] = strategy
        self._fields["prompt_tokens"] = num_prompt
        self._observer.watch_session(self)
        if self._metrics is not None:
            self._metrics.sessions_open.inc()
            self._metrics.waiting.inc()
            self._counts = self._metrics.of_request(self._observer.model_name, strategy)
            if self._is_request:
                self._counts.prompt_tokens.inc(num_prompt)
                self._counts.prompt_lengths.observe(num_prompt)

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter that the span and the final log line report."""
        self._fields[name] = int(self._fields.get(name, 0)) + amount

    def wrote(self, num_tokens: int) -> None:
        """Record tokens that the service sends."""
        self.count("tokens", num_tokens)
        now = time.monotonic()
        if self._counts is not None and self._metrics is not None:
            self._counts.generation_tokens.inc(num_tokens)
            if self._num_tokens:
                self._counts.inter_token_seconds.observe(now - self._last_token)
            else:
                if self._is_request:
                    self._counts.first_token_seconds.observe(now - self._started)
                self._metrics.waiting.dec()
                self._metrics.running.inc()
        if not self._num_tokens:
            self._first_token, self._num_first = now, num_tokens
        self._last_token = now
        self._num_tokens += num_tokens

    def proposed(self, proposal: Proposal) -> None:
        """Record a proposal that the service sends."""
        if proposal.tokens:
            self.count("proposals")
            self.wrote(len(proposal.tokens))

    def verified(self, verdict: Verdict) -> None:
        """Record a verdict that the service sends."""
        self.count("passes")
        self.count("checked", verdict.num_checked)
        self.count("accepted", verdict.num_accepted)
        self.wrote(verdict.num_accepted + 1)
        if verdict.num_accepted < verdict.num_checked and self._span is not None:
            position = verdict.position + verdict.num_accepted
            fields = {"epoch": verdict.epoch, "position": position}
            self._span.add_event("mismatch", attributes_of(fields))

    def rolled_back(self, rollback: Rollback) -> None:
        """Record that the draft is rolled back to the verified position."""
        if self._span is not None:
            fields = {"epoch": rollback.epoch, "position": rollback.verified_position}
            self._span.add_event("rollback", attributes_of(fields))

    def fell_back(self, error: AmusdError) -> None:
        """Record that the draft is lost and the request continues without it."""
        # The status only: the message of the error may quote a token.
        reason = faults.status_of(error).name
        self._fields["fallback"] = reason
        if self._span is not None:
            self._span.add_event("fallback", attributes_of({"reason": reason}))

    def decoded(self, statistics: Statistics) -> None:
        """Record the statistics of a generation, also if it failed."""
        for name in ("passes", "drafted", "accepted", "rejected", "wasted", "rollbacks"):
            self._fields[name] = getattr(statistics, f"num_{name}")
        if self._counts is not None:
            self._counts.generation_ended(statistics)

    def finished(self, reason: str) -> None:
        """Record that an output ended as asked."""
        if self._counts is not None:
            self._counts.succeeded(reason)
            if self._num_tokens > self._num_first:
                seconds = self._last_token - self._first_token
                self._counts.output_token_seconds.observe(
                    seconds / (self._num_tokens - self._num_first)
                )

    def fail(self, status: str) -> None:
        """Record that the request ends with this gRPC status."""
        self._status = status
        if self._metrics is not None and self._is_request:
            self._metrics.failures.labels(status).inc()

    def close(self) -> None:
        """Record the end of the request and publish its span and log line; the last call."""
        seconds = time.monotonic() - self._started
        if self._counts is not None and self._metrics is not None:
            if self._is_request:
                self._counts.request_seconds.observe(seconds)
            if self._is_open:
                self._metrics.sessions_open.dec()
                (self._metrics.running if self._num_tokens else self._metrics.waiting).dec()
        fields = {**self._fields, "status": self._status}
        if self._span is not None:
            self._end(self._span, fields)
        message = "session ended" if self._is_open else "request refused"
        log.info(message, extra={"fields": {**fields, "seconds": round(seconds, 4)}})

    def _end(self, span: "Span", fields: dict[str, str | int | float]) -> None:
        from opentelemetry.trace import StatusCode  # noqa: PLC0415

        span.set_attributes(attributes_of({**fields, "session": self.session_id}))
        if self._status not in ("OK", "CANCELLED"):
            span.set_status(StatusCode.ERROR, self._status)
        span.end()


@contextlib.contextmanager
def observing(
    role: Role, settings: ObservationSettings, host: str = "127.0.0.1"
) -> Iterator[Observer]:
    """Serve metrics on ``host`` and send traces, where ``settings`` enable them, while it runs.

    Raises:
        UnavailableError: the metrics port is taken.
        InvalidInputError: traces are enabled, but OpenTelemetry is not installed.
    """
    with contextlib.ExitStack() as closing:
        metrics = tracing = None
        if settings.metrics_port:
            metrics = Metrics(role)
            endpoint = Endpoint(host, settings.metrics_port)
            closing.callback(MetricsServer(metrics.registry, endpoint).close)
            log.info("metrics at http://%s/metrics", endpoint)
        if settings.traces_endpoint:
            tracing = Tracing(settings.traces_endpoint, role)
            closing.callback(tracing.close)
        yield Observer(role, metrics, tracing)
