"""What the manifests say to the services, against what the commands and the code take."""

from typing import Any

import pytest
from typer.main import get_command

from amusd.cli.serve_command import serve
from amusd.pair.cache import CACHE_VARIABLE
from amusd.rpc.server import LIVE
from amusd.v1 import draft_pb2, orchestrator_pb2, verify_pb2
from tests.k8s.kustomize import Manifest, containers, environment

SERVICES = {
    "draft": draft_pb2.DESCRIPTOR.services_by_name["DraftService"].full_name,
    "verify": verify_pb2.DESCRIPTOR.services_by_name["VerifyService"].full_name,
    "orchestrator": orchestrator_pb2.DESCRIPTOR.services_by_name["OrchestratorService"].full_name,
}
# Variables that are read by others than the commands.
OTHERS = {
    CACHE_VARIABLE, "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN_PATH", "XDG_CACHE_HOME",
    "OMP_NUM_THREADS", "OTEL_EXPORTER_OTLP_ENDPOINT",
}  # fmt: skip


def command(role: str) -> Any:
    """Return the command of a service, of the kind that typer brings along."""
    group: Any = get_command(serve)
    return group.commands[role]


def options(role: str) -> dict[str, Any]:
    """Return the options of a service by their environment variables."""
    return {one.envvar: one for one in command(role).params if one.envvar}


def parts(manifests: list[Manifest]) -> list[tuple[str, Manifest, dict[str, str]]]:
    """Return role, container and environment of each service."""
    each = [(one["name"], one, environment(manifests, one)) for one in containers(manifests)]
    assert {role for role, _, _ in each} == set(SERVICES)
    return each


def test_every_container_runs_a_command_that_exists(manifests: list[Manifest]) -> None:
    for role, container, _ in parts(manifests):
        assert container["args"] == ["serve", role]
        assert options(role)


def test_every_variable_is_one_that_the_command_takes(manifests: list[Manifest]) -> None:
    for role, _, variables in parts(manifests):
        assert not variables.keys() - options(role).keys() - OTHERS


def test_every_value_is_one_that_the_command_takes(manifests: list[Manifest]) -> None:
    for role, container, variables in parts(manifests):
        taken = {key: value for key, value in variables.items() if key in options(role)}
        flags = [f"{options(role)[key].opts[0]}={value}" for key, value in taken.items()]
        # Parses and checks the values without running the command.
        context = command(role).make_context(container["name"], flags)
        assert context.params["grace"] == float(variables["AMUSD_GRACE"])


def test_ports_are_the_same_everywhere(manifests: list[Manifest]) -> None:
    for role, container, variables in parts(manifests):
        ports = {one["name"]: one["containerPort"] for one in container["ports"]}
        assert ports == {
            "grpc": int(variables["AMUSD_PORT"]),
            "metrics": int(variables["AMUSD_METRICS_PORT"]),
        }
        assert variables["AMUSD_HOST"] == "0.0.0.0"
        default = options(role)["AMUSD_PORT"].default
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
