"""What is read of an engine and its device when somebody scrapes the metrics.

The engine thread answers between two passes, as it answers any command; the thread that serves
the scrape waits for it, and shows what was there before if the pass takes long.
"""

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from amusd.engine.loading.device import gpu_uuid
from amusd.fleet.model_description import CacheUsage
from amusd.observe.metrics import meaning_of
from amusd.observe.nvml import DeviceCollector, open_device
from amusd.observe.observer import Observer
from amusd.protocol.errors import UnavailableError
from amusd.serving.engine_thread import EngineThread, Work

_READ_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class EngineState:
    """How many sessions an engine has, and how much memory for keys and values is in use."""

    num_open: int = 0
    num_waiting: int = 0
    usage: CacheUsage = CacheUsage(max_tokens=0)


class EngineCollector(Collector):
    """Reads an engine's state for each scrape."""

    def __init__(self, read: "Callable[[], concurrent.futures.Future[EngineState]]") -> None:
        """Ask for the state with ``read``, from any thread."""
        self._read = read
        self._last = EngineState()

    def collect(self) -> Iterable[Metric]:
        """Return the state now, or the last one known."""
        with contextlib.suppress(UnavailableError, concurrent.futures.TimeoutError):
            self._last = self._read().result(_READ_SECONDS)
        state = self._last
        for name, value in (
            ("amusd_requests_running", state.num_open),
            ("amusd_requests_waiting", state.num_waiting),
            ("amusd_kv_tokens_reserved", state.usage.num_reserved),
            ("amusd_kv_tokens_max", state.usage.max_tokens),
        ):
            yield GaugeMetricFamily(name, meaning_of(name), value)
        for name, value in (
            ("amusd_prefix_cache_hit_tokens_total", state.usage.num_cached),
            (
                "amusd_prefix_cache_query_tokens_total",
                state.usage.num_cached + state.usage.num_computed,
            ),
        ):
            yield CounterMetricFamily(name, meaning_of(name), value)


def watch_engine(
    observer: Observer,
    thread: EngineThread[Work],
    state_of: Callable[[Work], EngineState],
    device: str,
) -> None:
    """Show the state of an engine thread, and its GPU if it has one, among the metrics."""
    metrics = observer.metrics
    if metrics is None:
        return
    metrics.registry.register(EngineCollector(lambda: thread.submit(state_of)))

    def show_device(ready: "concurrent.futures.Future[Work]") -> None:
        uuid = gpu_uuid(device) if ready.exception() is None else None
        gpu = open_device(uuid) if uuid is not None else None
        if gpu is not None:
            metrics.registry.register(DeviceCollector(device, gpu))

    thread.ready.add_done_callback(show_device)
