"""What anyone with grpcurl sees: reflection, health, an answer and an error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.process.services import VERIFY_MODEL, Trio
from tests.process.synthetic import expected_output

pytestmark = pytest.mark.process

GRPCURL = str(Path(sys.executable).with_name("grpcurl"))
GENERATE = "amusd.v1.OrchestratorService/Generate"


def grpcurl(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [GRPCURL, "-plaintext", "-max-time", "30", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_every_service_lists_what_it_serves(trio: Trio) -> None:
    for service, name in (
        (trio.draft, "amusd.v1.DraftService"),
        (trio.verify, "amusd.v1.VerifyService"),
        (trio.orchestrator, "amusd.v1.OrchestratorService"),
    ):
        listed = grpcurl(service.address, "list").stdout.split()
        assert {name, "grpc.health.v1.Health"} <= set(listed)
        assert sum(one.startswith("amusd.") for one in listed) == 1


def test_every_service_says_that_it_is_healthy(trio: Trio) -> None:
    for service in (trio.draft, trio.verify, trio.orchestrator):
        done = grpcurl(service.address, "grpc.health.v1.Health/Check")
        assert json.loads(done.stdout) == {"status": "SERVING"}


def test_a_request_in_json_is_answered(trio: Trio) -> None:
    request = {"tokens": {"ids": [1, 2]}, "max_tokens": 9, "strategy": "STRATEGY_AMUSD"}
    done = grpcurl("-d", json.dumps(request), trio.orchestrator.address, GENERATE)
    assert done.returncode == 0, done.stderr
    answers, rest = [], done.stdout.strip()
    while rest:
        answer, end = json.JSONDecoder().raw_decode(rest)
        answers.append(answer)
        rest = rest[end:].strip()
    tokens = [token for one in answers[:-1] for token in one["chunk"]["token_ids"]]
    assert tokens == expected_output(VERIFY_MODEL, (1, 2), 9)
    assert answers[-1]["completion"]["finish_reason"] == "FINISH_REASON_LENGTH"


def test_a_bad_request_in_json_gets_its_status(trio: Trio) -> None:
    done = grpcurl("-d", '{"text": ""}', trio.orchestrator.address, GENERATE)
    assert done.returncode != 0
    assert "Code: InvalidArgument" in done.stderr
    assert "prompt is empty" in done.stderr
