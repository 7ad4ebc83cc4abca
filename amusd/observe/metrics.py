"""The metrics of a service, and the registry that holds them.

Each service has its own registry. Any thread may add to a counter, including the engine thread:
prometheus_client guards each value with a lock that is held for one addition.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

import amusd
from amusd.analysis.generation_statistics import Statistics
from amusd.fleet.load_balancing import ReplicaState
from amusd.observe.metric_list import BY_NAME, ENGINES, Metric, Role
from amusd.observe.pass_listener import PassReport

ReplicaCount = Callable[[], Mapping[tuple[str, ReplicaState], int]]
"""Returns the number of replicas by role and state."""

_MetricT = TypeVar("_MetricT", Counter, Histogram)


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
        read_when_scraped = role in ENGINES
        self.running = self._gauge("amusd_requests_running", read_when_scraped)
        self.waiting = self._gauge("amusd_requests_waiting", read_when_scraped)
        self.sessions_open = self._gauge("amusd_sessions_open")
        self._gauge("amusd_build_info").labels(amusd.__version__).set(1)
        self._first_token_seconds = self._histogram("amusd_time_to_first_token_seconds")
        self._inter_token_seconds = self._histogram("amusd_inter_token_latency_seconds")
        self._output_token_seconds = self._histogram("amusd_time_per_output_token_seconds")
        self._request_seconds = self._histogram("amusd_request_seconds")
        self._prompt_lengths = self._histogram("amusd_request_prompt_tokens")
        self._output_lengths = self._histogram("amusd_request_generation_tokens")
        self._successes = self._counter("amusd_request_success_total")
        self._generation_tokens = self._counter("amusd_generation_tokens_total")
        self._prompt_tokens = self._counter("amusd_prompt_tokens_total")
        self.failures = self._counter("amusd_request_failures_total")
        self.rollbacks = self._counter("amusd_rollbacks_total")
        self._branches = self._counter("amusd_branches_total")
        self._branch_hits = self._counter("amusd_branch_hits_total")
        self._passes = self._counter("amusd_passes_total")
        self._drafts = self._counter("amusd_spec_decode_num_drafts_total")
        self._drafted = self._counter("amusd_spec_decode_num_draft_tokens_total")
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
        self._of_requests: dict[tuple[str, ...], RequestMetrics] = {}

    def passed(self, report: PassReport) -> None:
        """Record a pass; called on the engine thread."""
        self._pass_seconds.observe(report.seconds)
        self._pass_sessions.observe(report.num_sessions)
        if report.branch_seconds:
            self._branch_seconds.inc(report.branch_seconds)

    def of_request(self, model_name: str = "", strategy: str = "") -> "RequestMetrics":
        """Return what is counted of requests for a model with a strategy; empty: not known yet."""
        labels = (model_name, strategy) if self._role == "orchestrator" else ()
        found = self._of_requests.get(labels)
        if found is None:
            found = self._of_requests[labels] = RequestMetrics(self, labels)
        return found

    def count_replicas_by(self, count: ReplicaCount) -> None:
        """Export the replicas that ``count`` returns, by role and state, at each scrape."""
        self.registry.register(ReplicaCollector(count))

    def _registry_for(self, metric: Metric) -> CollectorRegistry | None:
        return self.registry if self._role in metric.roles else None

    def _gauge(self, name: str, read_when_scraped: bool = False) -> Gauge:
        metric = BY_NAME[name]
        registry = None if read_when_scraped else self._registry_for(metric)
        return Gauge(name, metric.meaning, metric.labels_for(self._role), registry=registry)

    def _counter(self, name: str) -> Counter:
        metric = BY_NAME[name]
        registry = self._registry_for(metric)
        return Counter(name, metric.meaning, metric.labels_for(self._role), registry=registry)

    def _histogram(self, name: str) -> Histogram:
        metric = BY_NAME[name]
        registry = self._registry_for(metric)
        labels = metric.labels_for(self._role)
        return Histogram(name, metric.meaning, labels, registry=registry, buckets=metric.buckets)


class RequestMetrics:
    """The metrics of requests that share their labels."""

    def __init__(self, metrics: Metrics, labels: tuple[str, ...]) -> None:
        """Count in ``metrics`` under the values of ``labels``."""
        self._metrics = metrics
        self._labels = labels
        self.first_token_seconds = self._one(metrics._first_token_seconds)
        self.inter_token_seconds = self._one(metrics._inter_token_seconds)
        self.output_token_seconds = self._one(metrics._output_token_seconds)
        self.request_seconds = self._one(metrics._request_seconds)
        self.prompt_lengths = self._one(metrics._prompt_lengths)
        self.output_lengths = self._one(metrics._output_lengths)
        self.generation_tokens = self._one(metrics._generation_tokens)
        self.prompt_tokens = self._one(metrics._prompt_tokens)

    def succeeded(self, finished_reason: str) -> None:
        """Count an output that ended as asked."""
        self._metrics._successes.labels(*self._labels, finished_reason).inc()

    def generation_ended(self, statistics: Statistics) -> None:
        """Count the token outcomes of an ended generation, all at once.

        So at every scrape, drafted tokens equal accepted, rejected and wasted tokens together.
        """
        metrics, labels = self._metrics, self._labels
        for one in statistics.acceptance_per_source:
            source = one.source.value
            metrics._drafted.labels(*labels, source).inc(one.num_drafted)
            metrics._accepted.labels(*labels, source).inc(one.num_accepted)
        self._one(metrics._rejected).inc(statistics.num_rejected)
        self._one(metrics._wasted).inc(statistics.num_wasted)
        self._one(metrics._passes).inc(statistics.num_passes)
        places = statistics.acceptance_per_position
        self._one(metrics._drafts).inc(places[0].num_checked if places else 0)
        for position, acceptance in enumerate(places):
            metrics._accepted_at.labels(*labels, position).inc(acceptance.num_accepted)
        metrics.rollbacks.inc(statistics.num_rollbacks)
        metrics._branches.inc(statistics.num_branches)
        metrics._branch_hits.inc(statistics.num_branch_hits)
        self.output_lengths.observe(statistics.num_output_tokens)

    def _one(self, metric: _MetricT) -> _MetricT:
        return metric.labels(*self._labels) if self._labels else metric


class ReplicaCollector(Collector):
    """Counts the replicas of an orchestrator's pools at each scrape."""

    def __init__(self, count: ReplicaCount) -> None:
        """Count with ``count``, which any thread may call."""
        self._count = count

    def collect(self) -> Iterable[prometheus_client.Metric]:
        """Return the current numbers."""
        metric = BY_NAME["amusd_pool_replicas"]
        gauge = GaugeMetricFamily(metric.name, metric.meaning, labels=metric.labels)
        for (role, state), num_replicas in self._count().items():
            gauge.add_metric([role, state.value], num_replicas)
        yield gauge
