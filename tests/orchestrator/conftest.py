"""Services in this process that end with their test."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.orchestrator.replicas import FakeDraft, FakeVerify, Host
from tests.orchestrator.running_backends import Serve


@pytest.fixture
async def hosts() -> AsyncIterator[list[Host]]:
    """Servers that end with the test."""
    running: list[Host] = []
    yield running
    await asyncio.gather(*(host.server.stop(0) for host in running))


@pytest.fixture
def serve(hosts: list[Host]) -> Serve:
    """Starts a service, and returns its address."""

    async def start(service: FakeVerify | FakeDraft, host: str = "127.0.0.1", port: int = 0) -> str:
        hosts.append(Host(service))
        return await hosts[-1].start(host, port)

    return start
