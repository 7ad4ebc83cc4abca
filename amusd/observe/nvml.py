"""Memory, utilization and energy of an NVIDIA GPU, read through NVML (nvidia-ml-py)."""

import importlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from amusd.observe.metric_list import meaning_of

log = logging.getLogger(__name__)


class Gpu(Protocol):
    """Readings of a GPU; None if the GPU does not provide one."""

    def memory_bytes(self) -> float | None:
        """Memory in use."""

    def utilization_ratio(self) -> float | None:
        """Share of the last sample period in which it was busy, 0 to 1."""

    def energy_joules(self) -> float | None:
        """Energy used since the driver was loaded."""


@dataclass(frozen=True, slots=True)
class NvmlGpu:
    """A GPU that NVML reads."""

    nvml: Any  # the module pynvml
    handle: Any

    def memory_bytes(self) -> float | None:
        """Memory in use."""
        return self._read(lambda: float(self.nvml.nvmlDeviceGetMemoryInfo(self.handle).used))

    def utilization_ratio(self) -> float | None:
        """Share of the last sample period in which it was busy, 0 to 1."""
        return self._read(lambda: self.nvml.nvmlDeviceGetUtilizationRates(self.handle).gpu / 100)

    def energy_joules(self) -> float | None:
        """Energy used since the driver was loaded."""
        # NVML counts millijoules.
        return self._read(lambda: self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1000)

    def _read(self, read: Callable[[], float]) -> float | None:
        try:
            return read()
        except self.nvml.NVMLError:  # virtual and old GPUs do not provide every reading
            return None


def open_device(uuid: str) -> Gpu | None:
    """Return the GPU with this UUID; None if nvidia-ml-py or the driver is missing."""
    try:
        pynvml: Any = importlib.import_module("pynvml")  # optional dependency
    except ImportError:
        log.info("no GPU metrics: install nvidia-ml-py for them")
        return None
    try:
        pynvml.nvmlInit()
        return NvmlGpu(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid))
    except pynvml.NVMLError as error:
        log.info("no GPU metrics: %s", error)
        return None


class DeviceCollector(Collector):
    """Reads a GPU at each scrape."""

    def __init__(self, name: str, gpu: Gpu) -> None:
        """Export ``gpu`` under the device label ``name``."""
        self._name = name
        self._gpu = gpu

    def collect(self) -> Iterable[Metric]:
        """Return the readings that the GPU provides."""
        for name, value in (
            ("amusd_device_memory_bytes", self._gpu.memory_bytes()),
            ("amusd_device_utilization_ratio", self._gpu.utilization_ratio()),
        ):
            if value is not None:
                gauge = GaugeMetricFamily(name, meaning_of(name), labels=["device"])
                gauge.add_metric([self._name], value)
                yield gauge
        joules = self._gpu.energy_joules()
        if joules is not None:
            name = "amusd_device_energy_joules_total"
            energy = CounterMetricFamily(name, meaning_of(name), labels=["device"])
            energy.add_metric([self._name], joules)
            yield energy
