"""The variables and ports of the manifests, against the settings that the services declare."""

import pytest

from amusd.cli.service_settings import SETTINGS
from amusd.observe.metric_list import Role
from amusd.pair.cache import CACHE_VARIABLE
from amusd.rpc.server import LIVE
from amusd.settings import Setting
from amusd.v1 import draft_pb2, orchestrator_pb2, verify_pb2
from tests.k8s.kustomize import Manifest, containers, environment

# Health answers for these names; a gateway has HTTP paths instead.
SERVICES: dict[Role, str] = {
    "draft": draft_pb2.DESCRIPTOR.services_by_name["DraftService"].full_name,
    "verify": verify_pb2.DESCRIPTOR.services_by_name["VerifyService"].full_name,
    "orchestrator": orchestrator_pb2.DESCRIPTOR.services_by_name["OrchestratorService"].full_name,
}
ROLES: tuple[Role, ...] = (*SERVICES, "gateway")
HTTP_PATHS = {"startup": "/live", "readiness": "/health", "liveness": "/live"}
# Variables that other programs and libraries read.
OTHERS = {
    CACHE_VARIABLE, "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN_PATH", "XDG_CACHE_HOME",
    "OMP_NUM_THREADS",
}  # fmt: skip


def settings(role: Role) -> dict[str, Setting]:
    """Return the settings of a service by their environment variables."""
    return {one.variable: one for one in SETTINGS[role]}


def parts(manifests: list[Manifest]) -> list[tuple[Role, Manifest, dict[str, str]]]:
    """Return role, container and environment of each service."""
    found = {one["name"]: one for one in containers(manifests)}
    assert found.keys() == set(ROLES)
    return [(role, found[role], environment(manifests, found[role])) for role in ROLES]


def service_named(manifests: list[Manifest], name: str) -> Manifest:
    """Return the spec of a Service."""
    services = (one for one in manifests if one["kind"] == "Service")
    (found,) = (one["spec"] for one in services if one["metadata"]["name"] == name)
    return dict(found)


def test_every_container_runs_a_service(manifests: list[Manifest]) -> None:
    for role, container, _ in parts(manifests):
        assert container["args"] == ["serve", role]


def test_every_variable_is_one_that_the_service_takes(manifests: list[Manifest]) -> None:
    for role, _, variables in parts(manifests):
        assert not variables.keys() - settings(role).keys() - OTHERS


def test_every_value_is_one_that_the_service_takes(manifests: list[Manifest]) -> None:
    for role, _, variables in parts(manifests):
        taken = {key: value for key, value in variables.items() if key in settings(role)}
        read = {key: settings(role)[key].read(value) for key, value in taken.items()}
        assert read["AMUSD_GRACE"] == float(variables["AMUSD_GRACE"])


def test_ports_are_the_same_everywhere(manifests: list[Manifest]) -> None:
    for role, container, variables in parts(manifests):
        ports = {one["name"]: one["containerPort"] for one in container["ports"]}
        kind = "http" if role == "gateway" else "grpc"
        wanted = {kind: int(variables["AMUSD_PORT"])}
        if "AMUSD_METRICS_PORT" in settings(role):
            wanted["metrics"] = int(variables["AMUSD_METRICS_PORT"])
        assert ports == wanted
        assert variables["AMUSD_HOST"] == "0.0.0.0"
        default = settings(role)["AMUSD_PORT"].default
        assert ports[kind] == default
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            ((how, asked),) = (
                (key, value) for key, value in container[probe].items() if isinstance(value, dict)
            )
            assert (how, asked["port"]) == ("httpGet" if kind == "http" else "grpc", default)
        for service in (one for one in manifests if one["kind"] == "Service"):
            if service["spec"]["selector"].get("app.kubernetes.io/component") == role:
                assert [one["port"] for one in service["spec"]["ports"]] == [default]


def test_probes_ask_for_the_names_that_health_answers_for(manifests: list[Manifest]) -> None:
    for role, container, _ in parts(manifests):
        if role not in SERVICES:
            continue
        asked = {
            probe: container[f"{probe}Probe"]["grpc"]["service"]
            for probe in ("startup", "readiness", "liveness")
        }
        assert asked == {
            "startup": SERVICES[role],
            "readiness": SERVICES[role],
            "liveness": LIVE,
        }


@pytest.mark.parametrize("role", ["draft", "verify"])
def test_the_orchestrator_is_told_the_pools(manifests: list[Manifest], role: str) -> None:
    (variables,) = (each for name, _, each in parts(manifests) if name == "orchestrator")
    host, port = variables[f"AMUSD_{role.upper()}"].split(":")
    service = service_named(manifests, host)
    assert service["clusterIP"] == "None"  # so that the name resolves to every pod
    assert service["ports"][0]["port"] == int(port)


def test_probes_of_a_gateway_ask_for_its_paths(manifests: list[Manifest]) -> None:
    (container,) = (one for role, one, _ in parts(manifests) if role == "gateway")
    asked = {probe: container[f"{probe}Probe"]["httpGet"]["path"] for probe in HTTP_PATHS}
    assert asked == HTTP_PATHS


def test_the_gateway_is_told_the_orchestrators(manifests: list[Manifest]) -> None:
    (variables,) = (each for role, _, each in parts(manifests) if role == "gateway")
    host, port = variables["AMUSD_ORCHESTRATOR"].split(":")
    service = service_named(manifests, host)
    assert service["selector"]["app.kubernetes.io/component"] == "orchestrator"
    # A cluster address leads only to pods that take new requests.
    assert service["type"] == "ClusterIP"
    assert service.get("clusterIP") is None
    assert service["ports"][0]["port"] == int(port)
