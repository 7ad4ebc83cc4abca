"""Services as processes that end with their tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from amusd.client import Client
from tests.process.services import Service, Starter, Trio, start_service, start_trio


@contextmanager
def starting(folder: Path) -> Iterator[Starter]:
    """Starts services that end with the context."""
    running: list[Service] = []

    def starter(role: str, *flags: str) -> Service:
        service = start_service(folder / f"{role}{len(running)}.log", role, *flags)
        running.append(service)
        return service

    try:
        yield starter
    finally:
        for service in reversed(running):
            service.end()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    """Starts services that end with the test."""
    with starting(tmp_path) as starter:
        yield starter


@pytest.fixture(scope="module")
def start_for_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    """Starts services that the tests of a module share."""
    with starting(tmp_path_factory.mktemp("services")) as starter:
        yield starter


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    """Services that all tests share; a test that harms them starts its own."""
    with starting(tmp_path_factory.mktemp("trio")) as starter:
        yield start_trio(starter)


@pytest.fixture
def client(trio: Trio) -> Iterator[Client]:
    with Client(trio.orchestrator.address, timeout_seconds=60) as connected:
        yield connected
