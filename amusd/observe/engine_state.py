"""Collectors that read the state of an engine and its device at each scrape.

The engine thread answers between two passes, like any command. The thread that serves the scrape
waits for the answer. If a pass takes too long, the scrape shows the previous state.
"""

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from amusd.engine.loading.device import gpu_uuid
from amusd.fleet.model_description import CacheUsage
from amusd.observe.metric_list import meaning_of
from amusd.observe.nvml import DeviceCollector, open_device
from amusd.observe.observer import Observer
from amusd.protocol.errors import UnavailableError
from amusd.serving.engine_health import EngineHealth
from amusd.serving.engine_thread import EngineThread, Work

_READ_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class EngineState:
    """The sessions of an engine, and the use of its KV cache.

    ``num_open`` sessions have KV cache; ``num_left_out`` of them found no place in the last batch.
    ``num_waiting`` sessions wait for KV cache. ``counters`` and ``gauges`` are further metrics of
    the role, by name.
    """

    num_open: int = 0
    num_waiting: int = 0
    usage: CacheUsage = CacheUsage(max_tokens=0)
    num_left_out: int = 0
    counters: dict[str, float] = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)


class EngineCollector(Collector):
    """Reads an engine's state for each scrape."""

    def __init__(
        self,
        read: "Callable[[], concurrent.futures.Future[EngineState]]",
        health: EngineHealth | None = None,
    ) -> None:
        """Read the state with ``read``, from any thread, and ``health`` if it is known."""
        self._read = read
        self._health = health
        self._last = EngineState()

    def collect(self) -> Iterable[Metric]:
        """Return the current state, or the last known one."""
        with contextlib.suppress(UnavailableError, concurrent.futures.TimeoutError):
            self._last = self._read().result(_READ_SECONDS)
        state = self._last
        for name, value in (
            ("amusd_requests_running", state.num_open - state.num_left_out),
            ("amusd_requests_waiting", state.num_waiting + state.num_left_out),
            ("amusd_kv_tokens_reserved", state.usage.num_reserved),
            ("amusd_kv_tokens_max", state.usage.max_tokens),
            *state.gauges.items(),
        ):
            yield GaugeMetricFamily(name, meaning_of(name), value)
        if self._health is not None:
            name = "amusd_engine_healthy"
            yield GaugeMetricFamily(name, meaning_of(name), 0 if self._health.problem else 1)
        for name, value in (
            ("amusd_prefix_cache_hit_tokens_total", state.usage.num_cached),
            (
                "amusd_prefix_cache_query_tokens_total",
                state.usage.num_cached + state.usage.num_computed,
            ),
            *state.counters.items(),
        ):
            yield CounterMetricFamily(name, meaning_of(name), value)


def watch_engine(
    observer: Observer,
    thread: EngineThread[Work],
    state_of: Callable[[Work], EngineState],
    device: str,
    health: EngineHealth,
) -> None:
    """Add the state of an engine thread, and of its GPU if it has one, to the metrics."""
    metrics = observer.metrics
    if metrics is None:
        return
    metrics.registry.register(EngineCollector(lambda: thread.submit(state_of), health))

    def show_device(ready: "concurrent.futures.Future[Work]") -> None:
        uuid = gpu_uuid(device) if ready.exception() is None else None
        gpu = open_device(uuid) if uuid is not None else None
        if gpu is not None:
            metrics.registry.register(DeviceCollector(device, gpu))

    thread.ready.add_done_callback(show_device)
