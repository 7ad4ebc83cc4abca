"""Metrics are served on every spelling of a host."""

import socket
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter

from amusd.fleet.endpoint import Endpoint
from amusd.observe.metrics_server import MetricsServer
from amusd.protocol.errors import UnavailableError
from amusd.rpc.server import Listen
from tests.rpc.test_listening import HOSTS, needs_ipv6


def free_port() -> int:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        return int(server.getsockname()[1])


def scrape(host: str, port: int) -> str:
    # No proxy of the environment comes between.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{host}:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


@needs_ipv6
@pytest.mark.parametrize("host", HOSTS)
def test_metrics_are_served_on_a_host_in_any_spelling(host: str) -> None:
    registry = CollectorRegistry()
    Counter("seen", "Scrapes.", registry=registry)
    port = free_port()
    server = MetricsServer(registry, Endpoint(Listen(host=host).host, port))
    is_ipv4 = host == "127.0.0.1"
    is_ipv6 = "::1" in host
    try:
        if not is_ipv6:
            assert "seen_total" in scrape("127.0.0.1", port)
        if not is_ipv4:
            assert "seen_total" in scrape("[::1]", port)
    finally:
        server.close()
    with pytest.raises(OSError, match="refused"):
        scrape("[::1]" if is_ipv6 else "127.0.0.1", port)


def test_a_taken_port_is_reported_with_its_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UnavailableError, match=r"metrics on .* in use; .*--metrics-port"):
            MetricsServer(CollectorRegistry(), Endpoint("127.0.0.1", port))
