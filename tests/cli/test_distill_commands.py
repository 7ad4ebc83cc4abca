"""``amusd distill`` and ``amusd acceptance`` with a tiny model: their output and errors."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.process.warm_commands import command_line_with_torch


@pytest.fixture(scope="module")
def verify(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tiny.build("llama"), tmp_path_factory.mktemp("verify"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    return path


def amusd(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return command_line_with_torch().run("amusd", *map(str, arguments))


def distill(verify: str, output: Path, *more: str | Path) -> "subprocess.CompletedProcess[str]":
    small = ("--num-layers", "1", "--draft-vocab", "64", "--tokens", "300", "--epochs", "1")
    sizes = ("--write-batch", "16", "--answer-tokens", "10", "--threads", "1")
    return amusd("distill", "--verify", verify, "--output", output, *small, *sizes, *more)


@pytest.mark.slow
def test_a_draft_is_made_and_measured(verify: str, prompts: Path, tmp_path: Path) -> None:
    text = tmp_path / "some.txt"
    text.write_text("A paragraph.\n\nAnother one.\n")
    draft, report = tmp_path / "draft", tmp_path / "report.json"
    made = distill(verify, draft, "--prompts", prompts, "--prompts", text)
    assert made.returncode == 0, made.stderr
    assert f"amusd serve draft --model {draft}" in made.stdout
    assert "written: " in made.stderr
    measured = amusd(
        *("acceptance", "--draft", draft, "--draft", verify, "--verify", verify),
        *("--prompts", prompts, "--max-tokens", "12", "--temperature", "0.8", "--output", report),
    )
    assert measured.returncode == 0, measured.stderr
    found = json.loads(report.read_text())
    ours, itself = found["drafts"]
    assert itself["greedy"]["value"] == itself["sampled"]["value"] == 1.0
    assert ours["num_layers"] == 1
    assert ours["num_computed"] < itself["num_computed"]
    assert len(found["pass_seconds"]) == 9
    assert "100.0%" in measured.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "0,x"], "cannot read layers '0,x'"),
        (["--num-layers", "5"], "the verify model has 2 layers"),
        (["--prompts", "nowhere.jsonl"], "cannot read prompts from nowhere.jsonl"),
        (["--device", "warp:0"], "device 'warp:0' cannot be used"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    verify: str, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = distill(verify, tmp_path / "draft", *arguments)
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_bad_line_of_prompts_is_named(verify: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt": \n')
    result = distill(verify, tmp_path / "draft", "--prompts", path)
    assert result.returncode == 1
    assert f"{path}, line 2: not JSON" in result.stderr


def test_acceptance_names_a_missing_draft(verify: str, prompts: Path) -> None:
    result = amusd(
        *("acceptance", "--draft", "/no/such/draft", "--verify", verify, "--prompts", prompts)
    )
    assert result.returncode == 1
    assert "there is no model folder /no/such/draft" in result.stderr


@pytest.mark.slow
def test_the_next_run_resumes_after_ctrl_c(verify: str, tmp_path: Path) -> None:
    output = tmp_path / "draft"
    command = [sys.executable, "-m", "amusd", "distill", "--verify", verify, "--output"]
    sizes = ["--num-layers", "1", "--tokens", "1000000", "--write-batch", "8", "--threads", "1"]
    with subprocess.Popen(
        [*command, str(output), *sizes], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("written: "):
                break
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again" in stderr
    assert "Traceback" not in stderr
    assert (output / "data" / "answers-000000.safetensors").exists()
    assert distill(verify, output, "--answer-tokens", "128", "--write-batch", "8").returncode == 0


def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    verify: str, prompts: Path
) -> None:
    models = ("--draft", verify, "--verify", verify, "--prompts", prompts)
    result = amusd("acceptance", *models, "--output", "/no/such/folder/report.json")
    assert result.returncode == 1
    assert "there is no folder /no/such/folder" in result.stderr
