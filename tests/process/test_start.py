"""Services that start, fail to start and end: health, exit codes and one line of advice."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from amusd.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from tests.process.services import DRAFT_MODEL, VERIFY_MODEL, Service, Starter, Trio, amusd

pytestmark = pytest.mark.process

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def health(service: Service, name: str = "") -> int:
    with service.channel() as channel:
        request = health_pb2.HealthCheckRequest(service=name)
        return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=10).status)


def fails(*arguments: str) -> str:
    """Run a command that has to fail, and return its one line of advice."""
    done = amusd(*arguments)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_health_answers_for_each_service_by_name(trio: Trio) -> None:
    for service, name in (
        (trio.draft, "amusd.v1.DraftService"),
        (trio.verify, "amusd.v1.VerifyService"),
        (trio.orchestrator, "amusd.v1.OrchestratorService"),
    ):
        assert health(service) == SERVING
        assert health(service, name) == SERVING


def test_an_orchestrator_does_not_serve_before_its_services_do(start: Starter) -> None:
    # Nothing listens on the discard port.
    orchestrator = start("orchestrator", "--verify", "127.0.0.1:9", "--draft", "127.0.0.1:9")
    assert health(orchestrator) == NOT_SERVING
    assert health(orchestrator, "amusd.v1.OrchestratorService") == NOT_SERVING


def test_an_orchestrator_starts_without_a_draft_service_that_does_not_answer(
    start: Starter,
) -> None:
    verify = start("verify", "--model", VERIFY_MODEL)
    orchestrator = start(
        "orchestrator", "--verify", verify.address, "--draft", "127.0.0.1:9",
        "--startup-timeout", "1",
    )  # fmt: skip
    orchestrator.wait_until_serving()
    assert "without a draft" in orchestrator.log.read_text()


@pytest.mark.parametrize("role", ["draft", "verify"])
def test_sigterm_ends_a_service_with_exit_code_zero(start: Starter, role: str) -> None:
    service = start(role, "--model", VERIFY_MODEL)
    service.wait_until_serving()
    service.process.terminate()
    assert service.process.wait(20) == 0
    assert "Traceback" not in service.log.read_text()


def test_sigterm_ends_an_orchestrator_that_still_waits(start: Starter) -> None:
    orchestrator = start("orchestrator", "--verify", "127.0.0.1:9", "--draft", "127.0.0.1:9")
    orchestrator.process.terminate()
    assert orchestrator.process.wait(20) == 0
    assert "Traceback" not in orchestrator.log.read_text()


@pytest.mark.parametrize(
    ("role", "number"), [("verify", signal.SIGTERM), ("orchestrator", signal.SIGINT)]
)
def test_a_signal_while_a_download_hangs_is_a_normal_end(
    start: Starter, trio: Trio, role: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hub:  # accepts, and never answers
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        if role == "verify":
            service = start(role, "--model", "some/model")
        else:
            verify = trio.verify.address
            service = start(role, "--verify", verify, "--draft", "", "--tokenizer", "some/model")
        hub.settimeout(60)
        connection, _ = hub.accept()
        with connection:
            service.process.send_signal(number)
            assert service.process.wait(5) == 0
    lines = service.log.read_text().splitlines()
    assert "ending before" in lines[-1]
    assert not any("Traceback" in line or "terminate called" in line for line in lines)


def test_the_end_of_standard_input_ends_a_service_with_that_flag() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "amusd", "serve", "verify", "--port", "0", "--end-with-stdin",
         "--model", VERIFY_MODEL],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"listening on 127.0.0.1:")
    _, stderr = process.communicate(b"", timeout=30)
    assert process.returncode == 0, stderr


def test_models_of_different_vocabularies_are_refused_at_start(start: Starter) -> None:
    verify = start("verify", "--model", "synthetic:vocabulary=2048")
    draft = start("draft", "--model", "synthetic:vocabulary=3000")
    line = fails(
        "serve", "orchestrator", "--verify", verify.address, "--draft", draft.address,
        "--port", "0",
    )  # fmt: skip
    assert "3000 tokens" in line
    assert "2048" in line
    assert "share their tokenizer" in line


def test_a_port_in_use_is_reported(trio: Trio) -> None:
    port = trio.verify.address.rpartition(":")[2]
    line = fails("serve", "verify", "--model", VERIFY_MODEL, "--port", port)
    assert port in line
    assert "--port" in line


def test_a_model_folder_that_is_not_there_is_reported(tmp_path: Path) -> None:
    folder = str(tmp_path / "nothing")
    assert folder in fails("serve", "verify", "--model", folder, "--port", "0")


def test_a_folder_without_a_model_is_reported(tmp_path: Path) -> None:
    assert str(tmp_path) in fails("serve", "verify", "--model", str(tmp_path), "--port", "0")


def test_a_verify_service_out_of_reach_is_reported() -> None:
    line = fails(
        "serve", "orchestrator", "--verify", "127.0.0.1:9", "--port", "0",
        "--startup-timeout", "1",
    )  # fmt: skip
    assert "127.0.0.1:9" in line


def test_prompt_lookup_cannot_verify() -> None:
    assert "only drafts" in fails("serve", "verify", "--model", "prompt-lookup", "--port", "0")


def test_a_bad_synthetic_model_is_reported() -> None:
    assert "colour" in fails("serve", "verify", "--model", "synthetic:colour=3", "--port", "0")


def test_an_unknown_device_is_reported(tmp_path: Path) -> None:
    line = fails("serve", "verify", "--model", str(tmp_path), "--device", "abacus", "--port", "0")
    assert "abacus" in line
    assert "--device" in line


def test_flags_are_environment_variables_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMUSD_MODEL", "synthetic:colour=3")
    monkeypatch.setenv("AMUSD_PORT", "0")
    assert "colour" in fails("serve", "draft")


def test_calls_before_the_model_is_loaded_are_unavailable(start: Starter) -> None:
    orchestrator = start("orchestrator", "--verify", "127.0.0.1:9", "--draft", "")
    with orchestrator.channel() as channel:
        stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetServerInfo(orchestrator_pb2.GetServerInfoRequest(), timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "try again" in str(caught.value.details())


def test_a_draft_service_takes_a_model_or_prompt_lookup(start: Starter) -> None:
    start("draft", "--model", DRAFT_MODEL).wait_until_serving()
    start("draft", "--model", "prompt-lookup").wait_until_serving()


@pytest.mark.parametrize(
    "command",
    [
        ("serve", "draft", "--model", "prompt-lookup", "--port", "0", "--lookup"),
        ("up", "--draft", "prompt-lookup", "--lookup"),
        ("up", "--draft", "", "--lookup"),
    ],
)
def test_lookup_without_a_draft_model_beside_it_is_refused(command: tuple[str, ...]) -> None:
    assert "needs a draft model" in fails(*command)


def test_lookup_can_be_set_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMUSD_LOOKUP", "1")
    line = fails("serve", "draft", "--model", "prompt-lookup", "--port", "0")
    assert "without --lookup" in line


def test_only_a_draft_service_has_the_lookup_flag() -> None:
    done = amusd("serve", "verify", "--lookup")
    assert done.returncode == 2
    assert "--lookup" in done.stderr
