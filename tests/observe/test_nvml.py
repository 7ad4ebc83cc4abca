"""Metrics of a GPU, with a fake driver."""

import sys
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry

from amusd.observe.nvml import DeviceCollector, NvmlGpu, open_device


class NvmlError(Exception):
    """The error of the fake driver."""


def driver(has_energy: bool) -> SimpleNamespace:
    def energy(handle: object) -> int:
        if not has_energy:
            raise NvmlError
        return 5_500

    return SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=1024),
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=40),
        nvmlDeviceGetTotalEnergyConsumption=energy,
    )


def exported(nvml: SimpleNamespace) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(DeviceCollector("cuda:0", NvmlGpu(nvml, "GPU-1")))
    return {
        sample.name: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.labels == {"device": "cuda:0"}
    }


def test_units_are_bytes_ratios_and_joules() -> None:
    assert exported(driver(has_energy=True)) == {
        "amusd_device_memory_bytes": 1024.0,
        "amusd_device_utilization_ratio": 0.4,
        "amusd_device_energy_joules_total": 5.5,
    }


def test_readings_that_a_gpu_does_not_provide_are_left_out() -> None:
    assert "amusd_device_energy_joules_total" not in exported(driver(has_energy=False))


def test_without_a_driver_there_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = driver(has_energy=True)

    def no_driver() -> None:
        raise NvmlError("no driver")

    broken.nvmlInit = no_driver
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    assert open_device("GPU-1") is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_device("GPU-1") is None
