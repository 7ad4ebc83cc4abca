"""The compute threads of an engine, within what the machine allows."""

import logging
import os
import threading
from collections.abc import Iterator

import pytest
import torch

from amusd.engine.loading import device
from amusd.engine.loading.device import DeviceSettings, prepare_torch


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("requested", "default", "usable", "expected"),
    [(0, 8, 2, 2), (0, 1, 4, 1), (3, 8, 4, 3), (4, 1, 4, 4), (8, 1, 2, 2)],
)
def test_threads_stay_within_the_cores_that_are_usable(
    monkeypatch: pytest.MonkeyPatch, requested: int, default: int, usable: int, expected: int
) -> None:
    torch.set_num_threads(default)
    monkeypatch.setattr(device, "usable_cpus", lambda: usable)
    prepare_torch(DeviceSettings(threads=requested))
    assert torch.get_num_threads() == expected


def test_more_threads_than_cores_are_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device, "usable_cpus", lambda: 2)
    with caplog.at_level(logging.WARNING):
        prepare_torch(DeviceSettings(threads=8))
    (record,) = caplog.records
    assert "--threads 8 exceeds the 2 CPU cores" in record.getMessage()


def test_the_cores_that_the_engine_is_bound_to_count() -> None:
    cpu = min(os.sched_getaffinity(0))
    found: list[int] = []

    def run() -> None:
        settings = DeviceSettings(threads=2, cpus=(cpu,))
        device.bind_engine_thread(settings)
        prepare_torch(settings)
        found.append(torch.get_num_threads())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [1]
