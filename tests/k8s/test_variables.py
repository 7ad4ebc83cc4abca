"""The variables and ports of the manifests, against the settings that the services declare."""

import pytest

from amusd.cli.service_settings import SETTINGS
from amusd.observe.metric_list import Role
from amusd.pair.cache import CACHE_VARIABLE
from amusd.rpc.server import LIVE
from amusd.settings import Setting
from amusd.v1 import draft_pb2, orchestrator_pb2, verify_pb2
from tests.k8s.kustomize import Manifest, containers, environment

SERVICES: dict[Role, str] = {
    "draft": draft_pb2.DESCRIPTOR.services_by_name["DraftService"].full_name,
    "verify": verify_pb2.DESCRIPTOR.services_by_name["VerifyService"].full_name,
    "orchestrator": orchestrator_pb2.DESCRIPTOR.services_by_name["OrchestratorService"].full_name,
}
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
    assert found.keys() == SERVICES.keys()
    return [(role, found[role], environment(manifests, found[role])) for role in SERVICES]


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
        assert ports == {
            "grpc": int(variables["AMUSD_PORT"]),
            "metrics": int(variables["AMUSD_METRICS_PORT"]),
        }
        assert variables["AMUSD_HOST"] == "0.0.0.0"
        default = settings(role)["AMUSD_PORT"].default
        assert ports["grpc"] == default
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["grpc"]["port"] == default
        for service in (one for one in manifests if one["kind"] == "Service"):
            if service["spec"]["selector"].get("app.kubernetes.io/component") == role:
                assert [one["port"] for one in service["spec"]["ports"]] == [default]


def test_probes_ask_for_the_names_that_health_answers_for(manifests: list[Manifest]) -> None:
    for role, container, _ in parts(manifests):
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
    (service,) = (
        one for one in manifests if one["kind"] == "Service" and one["metadata"]["name"] == host
    )
    assert service["spec"]["clusterIP"] == "None"  # so that the name resolves to every pod
    assert service["spec"]["ports"][0]["port"] == int(port)
