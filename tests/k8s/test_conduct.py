"""Pods: times of start and end that must fit each other, restrictions, selectors."""

import ipaddress
from typing import Any

import pytest

from tests.k8s.kustomize import Manifest, environment

END_MARGIN_SECONDS = 10
START_SLACK_SECONDS = 60


def deployments(manifests: list[Manifest]) -> list[Manifest]:
    return [one for one in manifests if one["kind"] == "Deployment"]


def pod(deployment: Manifest) -> dict[str, Any]:
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


def pods(manifests: list[Manifest]) -> list[tuple[dict[str, Any], Manifest, dict[str, str]]]:
    """Return pod, container and environment of each deployment."""
    specs = [pod(one) for one in deployments(manifests)]
    return [
        (one, one["containers"][0], environment(manifests, one["containers"][0])) for one in specs
    ]


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [one for one in manifests if one["kind"] == kind]


def startup_seconds(container: Manifest) -> int:
    probe = container["startupProbe"]
    return int(probe["periodSeconds"]) * int(probe["failureThreshold"])


def test_a_pod_has_enough_time_to_drain(manifests: list[Manifest]) -> None:
    for spec, container, variables in pods(manifests):
        sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        needed = sleep + float(variables["AMUSD_GRACE"]) + END_MARGIN_SECONDS
        assert spec["terminationGracePeriodSeconds"] >= needed


def test_clients_leave_an_orchestrator_before_it_drains(manifests: list[Manifest]) -> None:
    (found,) = (one for one in pods(manifests) if one[1]["name"] == "orchestrator")
    _, container, variables = found
    age = float(variables["AMUSD_MAX_CONNECTION_AGE"])
    # gRPC varies the age of a connection by up to 10 %.
    assert container["lifecycle"]["preStop"]["sleep"]["seconds"] > 1.1 * age > 0


def test_a_rollout_waits_until_a_model_is_loaded(manifests: list[Manifest]) -> None:
    for deployment in deployments(manifests):
        (container,) = pod(deployment)["containers"]
        deadline = deployment["spec"]["progressDeadlineSeconds"]
        assert deadline >= startup_seconds(container) + START_SLACK_SECONDS


def test_a_rollout_of_gateways_waits_until_an_orchestrator_serves(
    manifests: list[Manifest],
) -> None:
    by_name = {one["metadata"]["name"]: one for one in deployments(manifests)}
    (orchestrator,) = pod(by_name["amusd-orchestrator"])["containers"]
    deadline = by_name["amusd-gateway"]["spec"]["progressDeadlineSeconds"]
    assert deadline >= startup_seconds(orchestrator) + START_SLACK_SECONDS


def test_an_orchestrator_waits_as_long_as_a_model_may_take_to_load(
    manifests: list[Manifest],
) -> None:
    by_role = {container["name"]: (container, env) for _, container, env in pods(manifests)}
    orchestrator, variables = by_role["orchestrator"]
    loading = startup_seconds(by_role["verify"][0])
    assert float(variables["AMUSD_STARTUP_TIMEOUT"]) >= loading
    assert startup_seconds(orchestrator) >= loading


def test_an_upgrade_removes_no_pod_before_its_successor_serves(
    manifests: list[Manifest],
) -> None:
    for deployment in deployments(manifests):
        assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_pods_are_restricted(manifests: list[Manifest]) -> None:
    (namespace,) = of_kind(manifests, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for spec, container, _ in pods(manifests):
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_services_do_not_set_variables_in_pods(manifests: list[Manifest]) -> None:
    # The Service amusd would set AMUSD_PORT, the variable of --port.
    assert all(spec["enableServiceLinks"] is False for spec, _, _ in pods(manifests))


def test_a_service_writes_only_to_volumes(manifests: list[Manifest]) -> None:
    for spec, container, variables in pods(manifests):
        mounts = [one["mountPath"] for one in container["volumeMounts"]]
        assert {one["name"] for one in container["volumeMounts"]} == {
            one["name"] for one in spec["volumes"]
        }
        for name in ("AMUSD_CACHE_DIR", "HF_HOME", "XDG_CACHE_HOME", "HF_TOKEN_PATH"):
            path = variables.get(name, "/tmp")
            assert any(path == mount or path.startswith(f"{mount}/") for mount in mounts), name


def test_a_gpu_pod_requests_one_gpu_and_tolerates_its_taint(
    overlay: str, manifests: list[Manifest]
) -> None:
    for spec, container, variables in pods(manifests):
        on_gpu = variables.get("AMUSD_DEVICE", "cpu").startswith("cuda")
        limits = container["resources"]["limits"]
        assert limits.get("nvidia.com/gpu") == (1 if on_gpu else None)
        assert ("tolerations" in spec) == on_gpu
        assert container["image"].endswith("-cpu" if overlay == "cpu-demo" else "-cuda")


def test_only_orchestrators_reach_the_pools(manifests: list[Manifest]) -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind(manifests, "NetworkPolicy")}
    everything: dict[str, Any] = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert policies["amusd-default-deny"] == everything
    for role in ("draft", "verify"):
        (rule,) = policies[f"amusd-{role}"]["ingress"]
        (source,) = rule["from"]
        labels = source["podSelector"]["matchLabels"]
        assert labels["app.kubernetes.io/component"] == "orchestrator"
        assert "namespaceSelector" not in source


def reached_from(rules: list[dict[str, Any]]) -> set[str]:
    """Return the names of the sources of ingress rules."""
    sources = [source for rule in rules for source in rule["from"]]
    return {
        next(iter(one["namespaceSelector"]["matchLabels"]))
        if "namespaceSelector" in one
        else one["podSelector"].get("matchLabels", {}).get("app.kubernetes.io/component", "pods")
        for one in sources
    }


def test_clients_reach_gateways_and_these_only_orchestrators(manifests: list[Manifest]) -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind(manifests, "NetworkPolicy")}
    gateway = policies["amusd-gateway"]
    assert reached_from(gateway["ingress"]) == {"pods", "amusd/calls", "amusd/scrapes"}
    ((rule,), (ports,)) = gateway["egress"], [one["ports"] for one in gateway["egress"]]
    (target,) = rule["to"]
    assert target["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "orchestrator"
    assert ports == policies["amusd-orchestrator"]["ingress"][0]["ports"]
    assert "pods" in reached_from(policies["amusd-orchestrator"]["ingress"])


def test_a_gateway_does_not_reach_the_hub(manifests: list[Manifest]) -> None:
    for policy in of_kind(manifests, "NetworkPolicy"):
        rules = policy["spec"].get("egress", ())
        if any("ports" in rule and {"port": 443} in rule["ports"] for rule in rules):
            (left_out,) = policy["spec"]["podSelector"]["matchExpressions"]
            assert left_out == {
                "key": "app.kubernetes.io/component", "operator": "NotIn", "values": ["gateway"],
            }  # fmt: skip


DNS_SERVERS: dict[str, dict[str, Any]] = {
    "kube-dns": {"namespace": "kube-system", "port": 53},
    "kube-dns behind another port": {"namespace": "kube-system", "port": 5353},
    "OpenShift": {"namespace": "openshift-dns", "port": 5353},
    "NodeLocal DNSCache": {"address": "169.254.20.10", "port": 53},
}


def lets_out(rule: dict[str, Any], server: dict[str, Any], protocol: str) -> bool:
    """Whether an egress rule lets a packet to a DNS server out."""
    if {"port": server["port"], "protocol": protocol} not in rule["ports"]:
        return False
    name = "kubernetes.io/metadata.name"
    for target in rule["to"]:
        if "ipBlock" in target:
            network = ipaddress.ip_network(target["ipBlock"]["cidr"])
            if "address" in server and ipaddress.ip_address(server["address"]) in network:
                return True
        elif target["namespaceSelector"]["matchLabels"] == {name: server.get("namespace")}:
            return True
    return False


@pytest.mark.parametrize("server", DNS_SERVERS)
@pytest.mark.parametrize("protocol", ["UDP", "TCP"])
def test_every_pod_reaches_the_dns_of_the_usual_clusters(
    manifests: list[Manifest], server: str, protocol: str
) -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind(manifests, "NetworkPolicy")}
    policy = policies["amusd-dns"]
    assert policy["podSelector"] == {}
    assert any(lets_out(rule, DNS_SERVERS[server], protocol) for rule in policy["egress"])


def test_selectors_match_pods(manifests: list[Manifest]) -> None:
    labels = [one["spec"]["template"]["metadata"]["labels"] for one in deployments(manifests)]
    selectors = [one["spec"]["selector"] for one in of_kind(manifests, "Service")]
    for kind in ("Deployment", "PodDisruptionBudget"):
        selectors += [one["spec"]["selector"]["matchLabels"] for one in of_kind(manifests, kind)]
    assert len(selectors) >= 12
    for selector in selectors:
        assert any(selector.items() <= each.items() for each in labels), selector


def test_a_scaled_deployment_sets_no_replicas(manifests: list[Manifest]) -> None:
    by_name = {one["metadata"]["name"]: one for one in deployments(manifests)}
    scaled = of_kind(manifests, "HorizontalPodAutoscaler") + of_kind(manifests, "ScaledObject")
    for scaler in scaled:
        assert "replicas" not in by_name[scaler["spec"]["scaleTargetRef"]["name"]]["spec"]
