"""The probes of the manifests against real processes that load, serve and drain."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import httpx
import pytest
from filelock import FileLock
from grpc_health.v1 import health_pb2, health_pb2_grpc

from amusd.pair import ensure_smollm2
from amusd.v1 import draft_pb2, draft_pb2_grpc
from tests.k8s.kustomize import ROOT, containers, environment, render
from tests.process.services import START_SECONDS, Service, becomes_true, start_service

pytestmark = pytest.mark.process

GRPCURL = str(Path(sys.executable).with_name("grpcurl"))
MANIFESTS = render(ROOT / "k8s/overlays/cpu-demo")
CONTAINERS = {one["name"]: one for one in containers(MANIFESTS)}
PROBES = ("startup", "readiness", "liveness")
Passed = dict[str, bool]

LOADING: Passed = {"startup": False, "readiness": False, "liveness": True}
SERVING: Passed = {"startup": True, "readiness": True, "liveness": True}
DRAINING = LOADING
# A gateway is started as soon as it listens. It waits, or ends.
GATEWAY_NOT_READY: Passed = {"startup": True, "readiness": False, "liveness": True}


LONG = {"prompt": "Hello", "max_tokens": 500, "stream": True, "temperature": 0}


def probe(service: Service, name: str) -> bool:
    """Probe as a kubelet does; only SERVING, or a status below 400, passes."""
    declared = CONTAINERS[service.role][f"{name}Probe"]
    if "httpGet" in declared:
        url = f"http://{service.address}{declared['httpGet']['path']}"
        return httpx.get(url, timeout=declared["timeoutSeconds"]).status_code < 400
    asked = declared["grpc"]["service"]
    done = subprocess.run(
        [GRPCURL, "-plaintext", "-max-time", "10", "-d", json.dumps({"service": asked}),
         service.address, "grpc.health.v1.Health/Check"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return bool(json.loads(done.stdout)["status"] == "SERVING")


def probes(service: Service) -> Passed:
    return {name: probe(service, name) for name in PROBES}


Starter = Callable[..., Service]


@pytest.fixture
def start_as_in_the_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Starter]:
    """Start services with their container's variables, but with the test's own port and cache."""
    running: list[Service] = []

    def starter(role: str, **variables: str) -> Service:
        own = {"AMUSD_HOST": "127.0.0.1", "AMUSD_PORT": "0", "AMUSD_METRICS_PORT": "0"}
        with monkeypatch.context() as patch:
            given = environment(MANIFESTS, CONTAINERS[role]) | own | variables
            for name, value in given.items():
                patch.setenv(name, value)
            service = start_service(tmp_path / f"{role}.log", role, "--grace", "60")
        running.append(service)
        return service

    yield starter
    for service in reversed(running):
        service.process.kill()
        service.end()


def wait_for(health: health_pb2_grpc.HealthStub, service: Service, wanted: int) -> None:
    name = CONTAINERS[service.role]["readinessProbe"]["grpc"]["service"]
    request = health_pb2.HealthCheckRequest(service=name)
    watch = health.Watch(request, timeout=START_SECONDS)
    next(one for one in watch if one.status == wanted)
    watch.cancel()


@pytest.mark.pair
def test_a_pod_is_live_while_it_loads_and_drains_but_ready_only_in_between(
    start_as_in_the_pod: Starter, tmp_path: Path
) -> None:
    built = ensure_smollm2(progress=False)
    cache = tmp_path / "cache"
    (cache / "smollm2").mkdir(parents=True)
    # The lock keeps the service loading, as if another process wrote the model into the cache.
    with FileLock(cache / "smollm2" / "verify.lock"):
        draft = start_as_in_the_pod("draft", AMUSD_CACHE_DIR=str(cache))
        assert probes(draft) == LOADING
        (cache / "smollm2" / "draft").symlink_to(built.draft)
        (cache / "smollm2" / "verify").symlink_to(built.verify)
    with draft.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        wait_for(health, draft, health_pb2.HealthCheckResponse.SERVING)
        assert probes(draft) == SERVING

        requests: SimpleQueue[draft_pb2.ProposeRequest | None] = SimpleQueue()
        opening = draft_pb2.ProposeOpen(
            session_id="a", token_ids=[1, 2, 3], lookahead=4, max_position=50
        )
        requests.put(draft_pb2.ProposeRequest(open=opening))
        stub = draft_pb2_grpc.DraftServiceStub(channel)
        proposals = iter(stub.Propose(iter(requests.get, None), timeout=60))
        next(proposals)
        draft.process.terminate()
        wait_for(health, draft, health_pb2.HealthCheckResponse.NOT_SERVING)
        assert probes(draft) == DRAINING
        requests.put(None)
        list(proposals)
    assert draft.process.wait(20) == 0


def test_orchestrators_and_gateways_are_ready_once_their_services_are(
    start_as_in_the_pod: Starter,
) -> None:
    alone = start_as_in_the_pod("orchestrator", AMUSD_VERIFY="127.0.0.1:9")
    assert probes(alone) == LOADING
    waiting = start_as_in_the_pod("gateway", AMUSD_ORCHESTRATOR=alone.address)
    assert probes(waiting) == GATEWAY_NOT_READY
    model = {"AMUSD_MODEL": "synthetic:pass_ms=20,vocabulary=512,context=600"}
    verify, draft = (start_as_in_the_pod(role, **model) for role in ("verify", "draft"))
    addresses = {"AMUSD_VERIFY": verify.address, "AMUSD_DRAFT": draft.address}
    orchestrator = start_as_in_the_pod("orchestrator", **addresses)
    orchestrator.wait_until_serving()
    gateway = start_as_in_the_pod("gateway", AMUSD_ORCHESTRATOR=orchestrator.address)
    assert becomes_true(lambda: probe(gateway, "readiness"))
    for service in (verify, draft, orchestrator, gateway):
        assert probes(service) == SERVING
    with httpx.stream("POST", f"http://{gateway.address}/v1/completions", json=LONG) as answer:
        assert answer.status_code == 200, answer.read()
        lines = answer.iter_lines()  # the stream closes with this iterator
        next(lines)
        gateway.process.terminate()
        assert becomes_true(lambda: not probe(gateway, "readiness"))
        assert probes(gateway) == GATEWAY_NOT_READY
    assert gateway.process.wait(20) == 0
