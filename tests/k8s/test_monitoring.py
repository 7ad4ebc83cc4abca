"""Dashboards, alerts and autoscalers use existing metrics, and every alert is documented."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from amusd.observe.metric_list import METRIC_NAMES, METRICS
from gateway.gateway_metrics import GatewayMetrics
from tests.k8s.kustomize import ROOT, render

promql = pytest.importorskip("promql_parser", reason="not installed: make setup")

MONITORING = render(ROOT / "k8s/overlays/monitoring")
SUFFIXES = ("_bucket", "_count", "_sum")
OTHERS = {"up"}
OF_GATEWAY = list(GatewayMetrics().registry.collect())
HISTOGRAMS = {metric.name for metric in METRICS if metric.buckets} | {
    metric.name for metric in OF_GATEWAY if metric.type == "histogram"
}
KNOWN = METRIC_NAMES | {
    f"{metric.name}_total" if metric.type == "counter" else metric.name for metric in OF_GATEWAY
}


def alerts() -> list[dict[str, Any]]:
    (rules,) = (one for one in MONITORING if one["kind"] == "PrometheusRule")
    return [rule for group in rules["spec"]["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    (board,) = (one for one in MONITORING if one["metadata"]["name"] == "amusd-dashboard")
    read: dict[str, Any] = json.loads(board["data"]["amusd.json"])
    return read


def expressions() -> list[str]:
    panels = dashboard()["panels"]
    shown = [target["expr"] for panel in panels for target in panel["targets"]]
    scaled = [
        trigger["metadata"]["query"]
        for one in render(ROOT / "k8s/overlays/autoscaling-keda")
        if one["kind"] == "ScaledObject"
        for trigger in one["spec"]["triggers"]
    ]
    # The parser does not know this variable of Grafana.
    every = [rule["expr"] for rule in alerts()] + shown + scaled
    return [one.replace("$__rate_interval", "5m") for one in every]


def metrics(expression: str) -> Iterator[str]:
    """Yield the names of the series that an expression reads."""
    pending = [promql.parse(expression)]
    while pending:
        node = pending.pop()
        if isinstance(node, promql.VectorSelector):
            yield node.name
        for name in ("lhs", "rhs", "expr", "vector_selector", "args", "param"):
            part = getattr(node, name, None)
            parts = part if isinstance(part, list) else [part]
            pending += [one for one in parts if one is not None and not isinstance(one, str)]


def family(series: str) -> str:
    for suffix in SUFFIXES:
        base = series.removesuffix(suffix)
        if base != series and base in HISTOGRAMS:
            return base
    return series


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_uses_existing_metrics(expression: str) -> None:
    series = list(metrics(expression))
    assert series
    assert {family(one) for one in series} <= KNOWN | OTHERS


def test_a_histogram_is_used_only_by_its_parts() -> None:
    for expression in expressions():
        assert not HISTOGRAMS & set(metrics(expression))


def test_an_autoscaler_uses_an_existing_metric() -> None:
    scalers = [
        one
        for one in render(ROOT / "k8s/overlays/autoscaling")
        if one["kind"] == "HorizontalPodAutoscaler"
    ]
    read = [entry for one in scalers for entry in one["spec"]["metrics"] if entry["type"] == "Pods"]
    assert read
    assert {one["pods"]["metric"]["name"] for one in read} <= METRIC_NAMES


def test_every_alert_is_documented() -> None:
    text = (ROOT / "docs/kubernetes.md").read_text()
    documented = set(re.findall(r"^### (Amusd\w+)$", text, re.MULTILINE))
    assert documented == {rule["alert"] for rule in alerts()}


def scraped_ports(template: dict[str, Any], services: list[dict[str, Any]]) -> list[int]:
    """Return the ports of a pod that services of metrics lead to."""
    (container,) = template["spec"]["containers"]
    numbers = {one["name"]: one["containerPort"] for one in container["ports"]}
    return [
        numbers[port["targetPort"]]
        for service in services
        if service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
        for port in service["spec"]["ports"]
        if port["targetPort"] in numbers
    ]


def is_let_in(template: dict[str, Any], port: int) -> bool:
    """Whether a network policy lets Prometheus reach a port of a pod."""
    source = {"namespaceSelector": {"matchLabels": {"amusd/scrapes": "true"}}}
    return any(
        source in rule["from"] and {"port": port} in rule["ports"]
        for policy in MONITORING
        if policy["kind"] == "NetworkPolicy"
        and policy["spec"]["podSelector"].get("matchLabels", {}).items()
        <= template["metadata"]["labels"].items()
        for rule in policy["spec"].get("ingress", ())
    )


def test_metrics_are_scraped_from_the_port_of_the_pods() -> None:
    (monitor,) = (one for one in MONITORING if one["kind"] == "ServiceMonitor")
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    every = (one for one in MONITORING if one["kind"] == "Service")
    services = [one for one in every if wanted <= one["metadata"]["labels"].items()]
    (endpoint,) = monitor["spec"]["endpoints"]
    for service in services:
        assert [endpoint["port"]] == [one["name"] for one in service["spec"]["ports"]]
        # The alerts select by this label.
        assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "amusd"
    deployments = [one for one in MONITORING if one["kind"] == "Deployment"]
    assert len(deployments) == 4
    for deployment in deployments:
        (target,) = scraped_ports(deployment["spec"]["template"], services)
        name = deployment["metadata"]["name"]
        assert target == (8000 if name == "amusd-gateway" else 9464)
        assert is_let_in(deployment["spec"]["template"], target)


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in dashboard()["panels"]]
    cells = {(one["x"], one["y"]) for one in places}
    assert len(cells) == len(places)
    assert all(one["x"] + one["w"] <= 24 for one in places)


def test_acceptance_is_the_share_of_the_compared_tokens() -> None:
    """Wasted tokens are no rejections: a right draft wastes some at the end of every output."""
    prefix = "amusd_spec_decode_num_"
    accepted = f"{prefix}accepted_tokens_total"
    ratios = [one for one in expressions() if accepted in set(metrics(one))]
    assert len(ratios) == 2  # an alert and a panel
    for ratio in ratios:
        assert set(metrics(ratio)) == {accepted, f"{prefix}rejected_tokens_total"}
