"""Services as processes that end with their tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from amusd.client import Client
from tests.process.services import Service, Starter, Trio, start_service, start_trio


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    """Starts services that end with the test."""
    running: list[Service] = []

    def starter(role: str, *flags: str) -> Service:
        service = start_service(tmp_path / f"{role}{len(running)}.log", role, *flags)
        running.append(service)
        return service

    yield starter
    for service in reversed(running):
        service.end()


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    """Services that all tests share; a test that harms them starts its own."""
    folder = tmp_path_factory.mktemp("trio")
    running: list[Service] = []

    def starter(role: str, *flags: str) -> Service:
        running.append(start_service(folder / f"{role}.log", role, *flags))
        return running[-1]

    try:
        yield start_trio(starter)
    finally:
        for service in reversed(running):
            service.end()


@pytest.fixture
def client(trio: Trio) -> Iterator[Client]:
    with Client(trio.orchestrator.address, timeout_seconds=60) as connected:
        yield connected
