"""The metrics of a service: names, meanings, units, and the registry that holds them.

Each service has its own registry. Any thread may add to a counter, including the engine thread:
prometheus_client guards each value with a lock that is held for one addition.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from amusd.analysis.generation_statistics import Statistics
from amusd.fleet.load_balancing import ReplicaState
from amusd.observe.pass_listener import PassReport

ReplicaCount = Callable[[], Mapping[tuple[str, ReplicaState], int]]
"""Returns the number of replicas by role and state."""

Role = Literal["draft", "verify", "orchestrator", "gateway"]

_ALL: tuple[Role, ...] = ("orchestrator", "draft", "verify")
_ENGINES: tuple[Role, ...] = ("draft", "verify")
_ORCHESTRATOR: tuple[Role, ...] = ("orchestrator",)

# Seconds of a pass, from a draft step on a GPU (1 ms) to a prefill chunk on CPU (seconds).
_PASS_BUCKETS = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15,
    0.25, 0.5, 1.0, 2.5, 5.0,
)  # fmt: skip
_FIRST_TOKEN_BUCKETS = (
    0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
_REQUEST_BUCKETS = (
    0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip
_SESSION_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its meaning, and the services that export it."""

    name: str
    meaning: str
    roles: tuple[Role, ...] = _ALL
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram. Empty for gauges and counters; counters end in ``_total``."""


METRICS = (
    Metric(
        "amusd_requests_running",
        "Requests with a place in the batch (draft, verify) or with a first token (orchestrator).",
    ),
    Metric(
        "amusd_requests_waiting",
        "Requests that wait for KV cache or for a place in the batch (draft, verify), or for a "
        "first token (orchestrator).",
    ),
    Metric("amusd_sessions_open", "Requests that were accepted and have not ended."),
    Metric(
        "amusd_time_to_first_token_seconds",
        "Time from the arrival of a request to its first token.",
        buckets=_FIRST_TOKEN_BUCKETS,
    ),
    Metric(
        "amusd_request_seconds",
        "Time from the arrival of a request to its end, including failed and refused requests.",
        buckets=_REQUEST_BUCKETS,
    ),
    Metric(
        "amusd_generation_tokens_total",
        "Tokens that the service produced: output tokens, verified tokens or drafted tokens.",
    ),
    Metric("amusd_prompt_tokens_total", "Prompt tokens of accepted requests."),
    Metric(
        "amusd_spec_decode_num_drafted_tokens_total",
        "Drafted tokens of ended generations.",
        _ORCHESTRATOR,
    ),
    Metric(
        "amusd_spec_decode_num_accepted_tokens_total",
        "Drafted tokens that the verify model accepted, and that the output holds.",
        _ORCHESTRATOR,
    ),
    Metric(
        "amusd_spec_decode_num_rejected_tokens_total",
        "Drafted tokens that the verify model rejected. Acceptance is accepted / (accepted + "
        "rejected).",
        _ORCHESTRATOR,
    ),
    Metric(
        "amusd_spec_decode_num_accepted_tokens_per_pos_total",
        "Accepted tokens by position in a pass, from 0.",
        _ORCHESTRATOR,
        ("position",),
    ),
    Metric(
        "amusd_spec_decode_num_wasted_tokens_total",
        "Drafted tokens that were never compared, because an earlier token was rejected or the "
        "output had ended.",
        _ORCHESTRATOR,
    ),
    Metric(
        "amusd_rollbacks_total",
        "Rollbacks of the draft to the verified position.",
        ("orchestrator", "draft"),
    ),
    Metric(
        "amusd_branches_total",
        "Branches that were held: continuations for other outcomes of a pass.",
        _ORCHESTRATOR,
    ),
    Metric(
        "amusd_branch_hits_total",
        "Branches that an epoch began with, so that the next pass did not wait for the draft.",
        _ORCHESTRATOR,
    ),
    Metric("amusd_branches_prepared_total", "Branches that were drafted.", ("draft",)),
    Metric("amusd_branch_tokens_total", "Tokens drafted for branches.", ("draft",)),
    Metric(
        "amusd_branch_rollback_hits_total",
        "Rollbacks whose outcome a branch was drafted for.",
        ("draft",),
    ),
    Metric(
        "amusd_branch_starts_total",
        "Rejections for which a branch was there, so that the next pass did not wait.",
        ("verify",),
    ),
    Metric("amusd_branches_held", "Branches of all sessions that are held now.", ("verify",)),
    Metric(
        "amusd_verify_pass_seconds",
        "Time of a verify pass over its whole batch.",
        ("verify",),
        buckets=_PASS_BUCKETS,
    ),
    Metric(
        "amusd_draft_step_seconds",
        "Time of a draft step over its whole batch.",
        ("draft",),
        buckets=_PASS_BUCKETS,
    ),
    Metric(
        "amusd_pass_sessions",
        "Batch size: sessions in a verify pass or draft step.",
        _ENGINES,
        buckets=_SESSION_BUCKETS,
    ),
    Metric(
        "amusd_branch_seconds_total",
        "Time of draft steps that went into branches: their share by tokens.",
        ("draft",),
    ),
    Metric(
        "amusd_pass_failures_total",
        "Batches in which a pass failed. The sessions that caused it have ended.",
        _ENGINES,
    ),
    Metric(
        "amusd_engine_healthy",
        "1 while the engine works, 0 while it hangs or fails and the service is NOT_SERVING.",
        _ENGINES,
    ),
    Metric("amusd_kv_tokens_reserved", "KV cache in use, in tokens.", _ENGINES),
    Metric("amusd_kv_tokens_max", "Capacity of the KV cache, in tokens.", _ENGINES),
    Metric(
        "amusd_prefix_cache_hit_tokens_total",
        "Prompt tokens found in the prefix cache.",
        _ENGINES,
    ),
    Metric(
        "amusd_prefix_cache_query_tokens_total",
        "Prompt tokens looked up in the prefix cache.",
        _ENGINES,
    ),
    Metric(
        "amusd_device_memory_bytes",
        "Memory in use on the GPU, by all processes.",
        _ENGINES,
        ("device",),
    ),
    Metric(
        "amusd_device_utilization_ratio",
        "Share of the last sample period in which the GPU was busy, 0 to 1.",
        _ENGINES,
        ("device",),
    ),
    Metric(
        "amusd_device_energy_joules_total",
        "Energy used by the GPU since its driver was loaded.",
        _ENGINES,
        ("device",),
    ),
    Metric(
        "amusd_request_failures_total",
        "Requests that ended with an error, by gRPC status.",
        labels=("status",),
    ),
    Metric(
        "amusd_pool_replicas",
        "Draft and verify replicas known to the orchestrator, by state.",
        _ORCHESTRATOR,
        ("role", "state"),
    ),
)

METRIC_NAMES = frozenset(metric.name for metric in METRICS)
"""The names of all metrics of all services."""

_BY_NAME = {metric.name: metric for metric in METRICS}


class Metrics:
    """The counters, gauges and histograms of one service.

    Every service has all attributes, but exports only those of its role. Engines and devices are
    read at each scrape by collectors of their own.
    """

    def __init__(self, role: Role) -> None:
        """Create all metrics of ``role``, at 0, in a new registry."""
        # Otherwise each counter gets a second series with its creation time.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._role = role
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        read_when_scraped = role in _ENGINES
        self.running = self._gauge("amusd_requests_running", read_when_scraped)
        self.waiting = self._gauge("amusd_requests_waiting", read_when_scraped)
        self.sessions_open = self._gauge("amusd_sessions_open")
        self.first_token_seconds = self._histogram("amusd_time_to_first_token_seconds")
        self.request_seconds = self._histogram("amusd_request_seconds")
        self.generation_tokens = self._counter("amusd_generation_tokens_total")
        self.prompt_tokens = self._counter("amusd_prompt_tokens_total")
        self.failures = self._counter("amusd_request_failures_total")
        self.rollbacks = self._counter("amusd_rollbacks_total")
        self._branches = self._counter("amusd_branches_total")
        self._branch_hits = self._counter("amusd_branch_hits_total")
        self._drafted = self._counter("amusd_spec_decode_num_drafted_tokens_total")
        self._accepted = self._counter("amusd_spec_decode_num_accepted_tokens_total")
        self._rejected = self._counter("amusd_spec_decode_num_rejected_tokens_total")
        self._accepted_at = self._counter("amusd_spec_decode_num_accepted_tokens_per_pos_total")
        self._wasted = self._counter("amusd_spec_decode_num_wasted_tokens_total")
        draft_step = self._histogram("amusd_draft_step_seconds")
        verify_pass = self._histogram("amusd_verify_pass_seconds")
        self._pass_seconds = draft_step if role == "draft" else verify_pass
        self._pass_sessions = self._histogram("amusd_pass_sessions")
        self._branch_seconds = self._counter("amusd_branch_seconds_total")
        self.pass_failures = self._counter("amusd_pass_failures_total")

    def passed(self, report: PassReport) -> None:
        """Record a pass; called on the engine thread."""
        self._pass_seconds.observe(report.seconds)
        self._pass_sessions.observe(report.num_sessions)
        if report.branch_seconds:
            self._branch_seconds.inc(report.branch_seconds)

    def generation_ended(self, statistics: Statistics) -> None:
        """Count the token outcomes of an ended generation, all at once.

        So at every scrape, drafted tokens equal accepted, rejected and wasted tokens together.
        """
        self._drafted.inc(statistics.num_drafted)
        self._accepted.inc(statistics.num_accepted)
        self._rejected.inc(statistics.num_rejected)
        self._wasted.inc(statistics.num_wasted)
        self.rollbacks.inc(statistics.num_rollbacks)
        self._branches.inc(statistics.num_branches)
        self._branch_hits.inc(statistics.num_branch_hits)
        for position, acceptance in enumerate(statistics.acceptance_per_position):
            self._accepted_at.labels(position).inc(acceptance.num_accepted)

    def count_replicas_by(self, count: ReplicaCount) -> None:
        """Export the replicas that ``count`` returns, by role and state, at each scrape."""
        self.registry.register(ReplicaCollector(count))

    def _registry_for(self, metric: Metric) -> CollectorRegistry | None:
        return self.registry if self._role in metric.roles else None

    def _gauge(self, name: str, read_when_scraped: bool = False) -> Gauge:
        metric = _BY_NAME[name]
        registry = None if read_when_scraped else self._registry_for(metric)
        return Gauge(name, metric.meaning, metric.labels, registry=registry)

    def _counter(self, name: str) -> Counter:
        metric = _BY_NAME[name]
        registry = self._registry_for(metric)
        return Counter(name, metric.meaning, metric.labels, registry=registry)

    def _histogram(self, name: str) -> Histogram:
        metric = _BY_NAME[name]
        registry = self._registry_for(metric)
        return Histogram(
            name, metric.meaning, metric.labels, registry=registry, buckets=metric.buckets
        )


class ReplicaCollector(Collector):
    """Counts the replicas of an orchestrator's pools at each scrape."""

    def __init__(self, count: ReplicaCount) -> None:
        """Count with ``count``, which any thread may call."""
        self._count = count

    def collect(self) -> Iterable[prometheus_client.Metric]:
        """Return the current numbers."""
        metric = _BY_NAME["amusd_pool_replicas"]
        gauge = GaugeMetricFamily(metric.name, metric.meaning, labels=metric.labels)
        for (role, state), num_replicas in self._count().items():
            gauge.add_metric([role, state.value], num_replicas)
        yield gauge


def meaning_of(name: str) -> str:
    """Return the meaning of a metric."""
    return _BY_NAME[name].meaning


def names_of(role: Role) -> set[str]:
    """Return the names of the metrics of a service."""
    return {metric.name for metric in METRICS if role in metric.roles}
