"""The commands of the command line, as processes."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from amusd.client import Client, Options
from amusd.prompts import Prompt
from tests.process.services import DRAFT_MODEL, VERIFY_MODEL, Trio, amusd, becomes_true
from tests.process.synthetic_models import expected_output
from tests.process.test_sharing import nothing_is_left

pytestmark = pytest.mark.process

PAIR = ("--draft", DRAFT_MODEL, "--verify", VERIFY_MODEL)


def test_generate_prints_the_text_and_the_statistics(trio: Trio) -> None:
    address = trio.orchestrator.address
    done = amusd("generate", "hello", "--raw", "--max-tokens", "30", "--address", address)
    assert done.returncode == 0, done.stderr
    expected = expected_output(VERIFY_MODEL, tuple(b"hello"), 30)
    text = bytes(token for token in expected if token < 256).decode(errors="replace")
    assert done.stdout.split() == text.split()
    assert "30 tokens" in done.stderr


def test_generate_ends_at_once_when_it_is_interrupted(trio: Trio) -> None:
    flags = ("--raw", "--strategy", "autoregressive", "--max-tokens", "590")
    command = (sys.executable, "-m", "amusd", "generate", "hello", *flags)
    process = subprocess.Popen(
        (*command, "--address", trio.orchestrator.address),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, b"")
    assert becomes_true(lambda: nothing_is_left(trio))


def test_generate_starts_and_ends_services_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMUSD_STARTED_BY_TEST", str(tmp_path))
    done = amusd("generate", "hello", "--raw", "--max-tokens", "5", *PAIR)
    assert done.returncode == 0, done.stderr
    left = [
        process
        for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get("AMUSD_STARTED_BY_TEST") == str(tmp_path)
    ]
    assert left == []


def test_compare_reports_that_all_strategies_write_the_same(trio: Trio) -> None:
    address = trio.orchestrator.address
    done = amusd(
        "compare", "hello", "--raw", "--max-tokens", "20", "--repeat", "2", "--address", address
    )
    assert done.returncode == 0, done.stderr
    for strategy in ("autoregressive", "speculative", "amusd"):
        rows = [line.split() for line in done.stdout.splitlines()]
        (row,) = (row for row in rows if row[:1] == [strategy] and "is" not in row)
        assert row[-1] == "yes"
    assert done.stdout.rstrip().endswith("all outputs are the same")


def test_bench_writes_the_figures_of_every_strategy(trio: Trio, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n\n{"prompt": "two"}\n{"prompt": "three"}\n')
    output = tmp_path / "bench.json"
    done = amusd(
        "bench", "--prompts", str(prompts), "--limit", "2", "--max-tokens", "25",
        "--strategies", "autoregressive,speculative:3,amusd", "--output", str(output),
        "--address", trio.orchestrator.address,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert [run["strategy"] for run in report["runs"]] == [
        "autoregressive",
        "speculative:3",
        "amusd",
    ]
    for run in report["runs"]:
        assert run["tokens"] == 50
        assert run["outputs_identical"] is True
        assert run["ms_per_token"] > 0
        assert {"speedup", "acceptance_rate", "tokens_per_pass", "rollbacks"} <= set(run)
    plain, _, overlapped = report["runs"]
    assert plain["speedup"] == 1.0
    assert plain["tokens_per_pass"] == 1.0
    assert overlapped["tokens_per_pass"] > 1.0
    assert report["num_prompts"] == 2


BAD_COMMANDS = {
    "an unknown strategy": (
        ["bench", "--prompts", "humaneval", "--strategies", "psychic", *PAIR],
        "unknown strategy 'psychic'",
    ),
    "a prompt file that is not there": (
        ["bench", "--prompts", "/nothing.jsonl", *PAIR],
        "/nothing.jsonl",
    ),
    "an unknown baseline": (
        ["bench", "--prompts", "humaneval", "--baseline", "abacus", *PAIR],
        "use transformers",
    ),
    "a baseline with services elsewhere": (
        ["bench", "--prompts", "humaneval", "--baseline", "transformers", "--address", "x:1"],
        "--address",
    ),
    "an output folder that is not there": (
        ["bench", "--prompts", "humaneval", "--output", "/nowhere/at/all.json", *PAIR],
        "/nowhere/at",
    ),
    "an output that is a folder": (
        ["bench", "--prompts", "humaneval", "--output", "/", *PAIR],
        "/ is a folder",
    ),
    "a prompt that is no text": (
        ["generate", "\udcff", "--address", "127.0.0.1:9"],
        "cannot be sent as UTF-8",
    ),
    "an empty prompt": (["generate", "", *PAIR], "prompt is empty"),
    "nothing at the address": (
        ["generate", "hello", "--address", "127.0.0.1:9"],
        "orchestrator at 127.0.0.1:9",
    ),
    "a chat with a model that has no template": (
        ["generate", "hello", *PAIR],
        "send the prompt as text",
    ),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_a_bad_command_ends_with_one_line_that_says_why(case: str) -> None:
    arguments, message = BAD_COMMANDS[case]
    done = amusd(*arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert message in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ', "line 2: not JSON"),
        ('{"prompt": ""}', "line 2: needs a prompt"),
        ('{"text": "x"}', "line 2: needs a prompt"),
        ('{"messages": [{"role": "user"}]}', "line 2: a message needs"),
        ("[1]", "line 2: needs a prompt"),
    ],
)
def test_a_bad_line_of_a_prompt_file_is_named(tmp_path: Path, line: str, message: str) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    done = amusd("bench", "--prompts", str(prompts), *PAIR)
    assert done.returncode == 1
    assert message in done.stderr
    assert str(prompts) in done.stderr


@pytest.fixture
def up(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    with (tmp_path / "up.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "amusd", "up", *PAIR, "--port", "0", "--draft-port", "0",
             "--verify-port", "0", "--gateway-port", "0"],
            stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    yield process
    if process.poll() is None:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def address_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("serving on "), line
    return line.split()[2].rstrip(";")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_serves_until_a_signal_and_leaves_nothing_running(
    up: "subprocess.Popen[str]", number: signal.Signals
) -> None:
    with Client(address_of(up), timeout_seconds=30) as client:
        generation = client.generate(Prompt(tokens=(1,)), Options(max_tokens=5)).wait()
    assert generation.tokens == expected_output(VERIFY_MODEL, (1,), 5)
    children = psutil.Process(up.pid).children(recursive=True)
    assert len(children) == 3
    up.send_signal(number)
    assert up.wait(30) == 0
    assert not any(child.is_running() for child in children)


def test_up_ends_if_one_of_its_services_does(up: "subprocess.Popen[str]") -> None:
    address_of(up)
    children = psutil.Process(up.pid).children(recursive=True)
    (verify,) = (child for child in children if "verify" in child.cmdline())
    verify.kill()
    assert up.wait(30) == 1
    assert not any(child.is_running() for child in children)


def test_services_end_with_a_parent_that_is_killed(up: "subprocess.Popen[str]") -> None:
    address_of(up)
    children = psutil.Process(up.pid).children(recursive=True)
    up.kill()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []
