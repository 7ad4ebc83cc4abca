"""The logs of real processes: one line for each session, and never a prompt or an output."""

import json
from pathlib import Path

import pytest

from amusd.client import Client, Generation, Options
from amusd.prompts import Prompt
from amusd.protocol.errors import AmusdError
from amusd.protocol.strategy import Strategy
from tests import tiny
from tests.process.services import (
    DRAFT_MODEL,
    VERIFY_MODEL,
    Service,
    Starter,
    Trio,
    becomes_true,
    start_trio,
)
from tests.process.test_sharing import Waiter

pytestmark = pytest.mark.process

MARKER = "zebra-4711"
ENDED = "session ended"
SYNTHETIC = (VERIFY_MODEL, DRAFT_MODEL)
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def start_logging_trio(start: Starter, *flags: str, models: tuple[str, str] = SYNTHETIC) -> Trio:
    def starter(role: str, *others: str) -> Service:
        return start(role, *others, *flags)

    return start_trio(starter, *models)


def logs_of(trio: Trio) -> dict[str, str]:
    services = (trio.orchestrator, trio.draft, trio.verify)
    return {service.role: service.log.read_text() for service in services}


def all_have_ended(trio: Trio, num_sessions: int) -> bool:
    return all(text.count(ENDED) == num_sessions for text in logs_of(trio).values())


def generate(trio: Trio, prompt: Prompt) -> Generation:
    with Client(trio.orchestrator.address, timeout_seconds=60) as client:
        return client.generate(prompt, Options(Strategy.AMUSD, 40)).wait()


@pytest.mark.parametrize("is_real", [False, True])
def test_prompts_and_outputs_are_never_logged(
    start: Starter, is_real: bool, tmp_path: Path
) -> None:
    real = tiny.save(tiny.build("llama"), tmp_path / "model", TEMPLATE) if is_real else ""
    models = (real, real) if is_real else SYNTHETIC
    trio = start_logging_trio(start, "--log-level", "debug", models=models)
    chat = Prompt(messages=(("user", f"say {MARKER}"),))
    generations = [generate(trio, Prompt(text=f"say {MARKER}"))]
    if is_real:
        generations.append(generate(trio, chat))
    for refused in (Prompt(messages=((MARKER, ""),)), Prompt(text=MARKER * 10_000)):
        with (
            Client(trio.orchestrator.address, timeout_seconds=60) as client,
            pytest.raises(AmusdError),
        ):
            client.generate(refused).wait()
    assert becomes_true(lambda: all_have_ended(trio, len(generations)))
    prompt_ids = ", ".join(str(one) for one in MARKER.encode())
    for log in logs_of(trio).values():
        assert MARKER not in log
        assert prompt_ids not in log
        for generation in generations:
            assert generation.text[:20] not in log
            assert ", ".join(map(str, generation.tokens[:4])) not in log


def test_json_logs_have_a_line_with_counts_for_each_session(start: Starter) -> None:
    trio = start_logging_trio(start, "--log-format", "json")
    summary = generate(trio, Prompt(tokens=(1, 2, 3))).summary()
    assert becomes_true(lambda: all_have_ended(trio, 1))
    sessions: set[str] = set()
    for role, log in logs_of(trio).items():
        lines = [json.loads(line) for line in log.splitlines()]
        assert all({"time", "level", "service", "message"} <= set(line) for line in lines)
        assert {line["service"] for line in lines} == {role}
        [ended] = [line for line in lines if line["message"] == ENDED]
        assert (ended["prompt_tokens"], ended["status"], ended["level"]) == (3, "OK", "INFO")
        sessions.add(ended["session"])
        if role == "orchestrator":
            assert (ended["tokens"], ended["strategy"]) == (40, "amusd")
            assert ended["drafted"] == summary.num_drafted
            assert ended["rollbacks"] == summary.num_rollbacks
    assert len(sessions) == 1


def test_a_session_id_cannot_forge_a_line_of_the_log(start: Starter) -> None:
    service = start("verify", "--model", VERIFY_MODEL)
    service.wait_until_serving()
    with service.channel() as channel:
        stream = Waiter(channel, "one\n2026 INFO verify forged")
        next(stream.responses)
        stream.cancel()
        assert becomes_true(lambda: ENDED in service.log.read_text())
    assert not [line for line in service.log.read_text().splitlines() if line.startswith("2026 ")]
