"""Reads the metrics that services export for Prometheus."""

import socket
import urllib.request
from dataclasses import dataclass, field
from typing import TypeVar

from prometheus_client.parser import text_string_to_metric_families

from tests.process.services import Service, Starter, start_trio

Key = TypeVar("Key")


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@dataclass(frozen=True)
class Scrape:
    """The metrics of a service at one moment."""

    values: dict[str, float] = field(default_factory=dict)
    """Samples by name, those with labels added up, buckets left out."""
    labelled: dict[tuple[str, str], float] = field(default_factory=dict)
    """Samples with one label, by name and the label's value."""
    names: set[str] = field(default_factory=set)

    def __getitem__(self, name: str) -> float:
        return self.values.get(name, 0.0)

    def since(self, before: "Scrape") -> "Scrape":
        """Return what has been counted since another scrape; what has not changed is left out."""
        return Scrape(
            _increases(self.values, before.values),
            _increases(self.labelled, before.labelled),
            self.names,
        )


def _increases(after: dict[Key, float], before: dict[Key, float]) -> dict[Key, float]:
    differences = {key: value - before.get(key, 0.0) for key, value in after.items()}
    return {key: difference for key, difference in differences.items() if difference}


def scrape(port: int) -> Scrape:
    """Return the metrics of the service with this metrics port."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    result = Scrape()
    for line in text.splitlines():
        if line.startswith("# TYPE amusd_"):
            result.names.add(line.split()[2])
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "le" in sample.labels:
                continue
            result.values[sample.name] = result.values.get(sample.name, 0.0) + sample.value
            for value in sample.labels.values():
                result.labelled[sample.name, value] = sample.value
    return result


@dataclass(frozen=True)
class WatchedTrio:
    """Three services with metrics, and their metrics ports."""

    orchestrator: Service
    draft: Service
    verify: Service
    ports: dict[str, int]
    before: dict[str, Scrape] = field(default_factory=dict)
    """Scrapes at the start of a test, by role."""

    def scrape(self, role: str) -> Scrape:
        return scrape(self.ports[role])

    def counted(self, role: str) -> Scrape:
        """Return what a service has counted in this test."""
        return self.scrape(role).since(self.before[role])


def start_watched(starter: Starter, verify_model: str, draft_model: str) -> WatchedTrio:
    """Start all three services with metrics."""
    ports = {role: free_port() for role in ("orchestrator", "draft", "verify")}

    def with_metrics(role: str, *flags: str) -> Service:
        return starter(role, *flags, "--metrics-port", str(ports[role]))

    trio = start_trio(with_metrics, verify_model, draft_model)
    return WatchedTrio(trio.orchestrator, trio.draft, trio.verify, ports)
