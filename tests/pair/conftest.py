"""The embedded pair behind real services, started once for all tests here."""

from collections.abc import Iterator

import pytest

from amusd.cli.local_services import LocalServices, LocalSettings, local_services
from amusd.client import Client


@pytest.fixture(scope="session")
def pair_services() -> Iterator[LocalServices]:
    with local_services(LocalSettings()) as services:
        yield services


@pytest.fixture(scope="session")
def client(pair_services: LocalServices) -> Iterator[Client]:
    with Client(pair_services.address, timeout_seconds=300) as connected:
        yield connected
