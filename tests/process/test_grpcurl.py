"""The services called with grpcurl: reflection, health, answers and errors."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.process.services import VERIFY_MODEL, Trio
from tests.process.synthetic_models import expected_output
from tests.process.test_draft_stream import PROMPT, Stream, drafted

pytestmark = pytest.mark.process

GRPCURL = str(Path(sys.executable).with_name("grpcurl"))
GENERATE = "amusd.v1.OrchestratorService/Generate"
ROLLBACK = "amusd.v1.DraftService/Rollback"


def grpcurl(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [GRPCURL, "-plaintext", "-max-time", "30", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def answers_of(done: "subprocess.CompletedProcess[str]") -> list[dict[str, Any]]:
    """Return the messages that a call was answered with."""
    assert done.returncode == 0, done.stderr
    answers, rest = [], done.stdout.strip()
    while rest:
        answer, end = json.JSONDecoder().raw_decode(rest)
        answers.append(answer)
        rest = rest[end:].strip()
    return answers


def test_every_service_lists_what_it_serves(trio: Trio) -> None:
    for service, name in (
        (trio.draft, "amusd.v1.DraftService"),
        (trio.verify, "amusd.v1.VerifyService"),
        (trio.orchestrator, "amusd.v1.OrchestratorService"),
    ):
        listed = grpcurl(service.address, "list").stdout.split()
        assert {name, "grpc.health.v1.Health"} <= set(listed)
        assert sum(one.startswith("amusd.") for one in listed) == 1


def test_every_service_reports_that_it_is_healthy(trio: Trio) -> None:
    for service in (trio.draft, trio.verify, trio.orchestrator):
        done = grpcurl(service.address, "grpc.health.v1.Health/Check")
        assert json.loads(done.stdout) == {"status": "SERVING"}


def test_a_request_in_json_is_answered(trio: Trio) -> None:
    request = {"tokens": {"ids": [1, 2]}, "max_tokens": 9, "strategy": "STRATEGY_AMUSD"}
    done = grpcurl("-d", json.dumps(request), trio.orchestrator.address, GENERATE)
    answers = answers_of(done)
    tokens = [token for one in answers[:-1] for token in one["chunk"]["token_ids"]]
    assert tokens == expected_output(VERIFY_MODEL, (1, 2), 9)
    assert answers[-1]["completion"]["finish_reason"] == "FINISH_REASON_LENGTH"


def test_sampling_in_json_is_answered_the_same_for_the_same_seed(trio: Trio) -> None:
    sampling = {
        "temperature": 0.7,
        "top_k": 40,
        "top_p": 0.9,
        "logit_bias": {"5": -1.5, "7": 2},
        "bad_words": [{"ids": [1, 2]}],
        "seed": "18446744073709551615",
    }
    request = {"tokens": {"ids": [1, 2]}, "max_tokens": 9, "sampling": sampling, "min_tokens": 2}
    outputs = []
    for strategy in ("STRATEGY_AUTOREGRESSIVE", "STRATEGY_AMUSD"):
        data = json.dumps({**request, "strategy": strategy})
        answers = answers_of(grpcurl("-d", data, trio.orchestrator.address, GENERATE))
        outputs.append([token for one in answers[:-1] for token in one["chunk"]["token_ids"]])
    assert len(outputs[0]) == 9
    assert outputs[0] == outputs[1]


def test_sampling_out_of_range_in_json_gets_its_status(trio: Trio) -> None:
    request = {"tokens": {"ids": [1]}, "sampling": {"min_p": "NaN"}}
    done = grpcurl("-d", json.dumps(request), trio.orchestrator.address, GENERATE)
    assert "Code: InvalidArgument" in done.stderr
    assert "min_p is nan: use 0 to 1" in done.stderr


def test_a_bad_request_in_json_gets_its_status(trio: Trio) -> None:
    done = grpcurl("-d", '{"text": ""}', trio.orchestrator.address, GENERATE)
    assert done.returncode != 0
    assert "Code: InvalidArgument" in done.stderr
    assert "prompt is empty" in done.stderr


def test_rollbacks_in_json_are_answered(trio: Trio) -> None:
    own = drafted(PROMPT, 4)
    at = {"session_id": "grpcurl", "verified_position": 5, "corrected_token_id": own[1]}
    requests = [{**at, "epoch": 1}, {**at, "epoch": 1}]
    with trio.draft.channel() as channel:
        stream = Stream(channel).open("grpcurl")
        stream.proposals(4)
        done = grpcurl("-d", "".join(map(json.dumps, requests)), trio.draft.address, ROLLBACK)
        first, repeated = answers_of(done)
        assert first == {"session_id": "grpcurl", "epoch": 1, "num_dropped": 3}
        assert repeated["error"]["code"] == 9
        assert "too old" in repeated["error"]["message"]
        assert {proposal.epoch for proposal in stream.proposals(4)} == {1}
        stream.end()


def test_a_rollback_of_an_unknown_session_is_answered_with_its_code(trio: Trio) -> None:
    request = {"session_id": "unknown", "epoch": 1, "verified_position": 4}
    done = grpcurl("-d", json.dumps(request), trio.draft.address, ROLLBACK)
    [answer] = answers_of(done)
    assert (answer["session_id"], answer["epoch"]) == ("unknown", 1)
    assert answer["error"]["code"] == 5
    assert "no session 'unknown' is open" in answer["error"]["message"]
