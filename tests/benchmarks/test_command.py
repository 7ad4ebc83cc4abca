"""The benchmark command with a tiny model measures every table."""

import json
import subprocess
from functools import partial
from pathlib import Path

import pytest
from transformers import LlamaConfig

from benchmarks import gpu
from benchmarks.rounds import Times, ratio, time_interleaved
from tests import tiny
from tests.process.warm_commands import command_line_with_torch


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return command_line_with_torch().run("benchmarks", *arguments)


@pytest.mark.slow
@pytest.mark.process
def test_every_table_is_measured_and_written(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("llama"), tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    report = tmp_path / "report.json"
    few = ["--rounds", "1", "--limit", "2", "--max-tokens", "8", "--prompts", str(prompts)]
    few += ["--clients", "1,2"]
    done = run("--verify", folder, "--draft", folder, *few, "--output", str(report))
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert found["machine"]["torch"]
    assert found["machine"]["processor"]
    assert found["settings"]["weights"] == ["compact", "plain"]
    tables = found["tables"]
    assert set(tables) == {
        "strategies", "clients", "one-token", "passes", "bandwidth", "sessions", "numerics",
        "sampling", "gpu-verify", "gpu-draft", "gpu-exact",
    }  # fmt: skip
    assert all(one["outputs_identical"] for one in tables["strategies"].values())
    clients = {f"{name}, {n} clients" for name in ("autoregressive", "amusd") for n in (1, 2)}
    assert set(tables["clients"]) == clients
    assert all(0 < one["verify_busy"] <= 1 for one in tables["clients"].values())
    assert all(one["same_tokens"] for one in tables["one-token"].values())
    assert set(tables["passes"]) == {"1", "2", "4", "8", "16"}
    assert all(one["to_one_token"] == [1, 1, 1] for one in tables["passes"]["1"].values())
    assert all(one["ms"] > 0 for size in tables["passes"].values() for one in size.values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "speed"], "unknown table 'speed': use one-token"),
        (["--verify", "synthetic"], "a synthetic model has no engine"),
        (["--weights", "light"], "cannot read weights 'light': use compact,plain,int8"),
        (["--cpus", "3-1"], "CPU cores '3-1' end before they start"),
        (["--clients", "0"], "cannot read clients '0': give numbers from 1 on, as 1,2,4,8"),
        (["--output", "/nowhere/report.json"], "no folder /nowhere"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert words in done.stderr


def test_the_gpu_tables_run_with_tiny_shapes_on_cpu() -> None:
    config = LlamaConfig(**tiny.COMMON, **tiny.NO_SPECIAL)
    large = gpu.large("cpu", 1, config, batch=2, context=40)
    assert [row[0] for row in large.rows] == ["1 token", "8 tokens", "2 sessions, 40 tokens each"]
    assert large.figures["batch"]["gain"][0] > 0
    assert large.figures["1 token"]["ratio"][0] > 0
    assert gpu.small("cpu", 1, config).figures["draft step"]["ratio"][0] > 0
    assert gpu.exact("cpu", 1, config).figures["exact"]["ratio"][0] > 0


def test_candidates_are_interleaved_after_a_warm_up_and_none_is_always_first() -> None:
    calls: list[str] = []
    times = time_interleaved({name: partial(calls.append, name) for name in "ab"}, rounds=2)
    runs = [name for index, name in enumerate(calls) if not index or calls[index - 1] != name]
    assert runs == ["a", "b", "a"]  # a first, then b first
    assert calls.count("a") == calls.count("b")
    assert all(len(found.seconds) == 2 for found in times.values())


def test_ratios_are_of_pairs() -> None:
    assert ratio(Times((2.0, 6.0, 30.0)), Times((1.0, 2.0, 5.0))) == (3.0, 2.5, 4.5)


def test_the_floor_of_a_pass_counts_reads_and_writes_of_a_copy() -> None:
    copy = gpu.MemoryCopy("cuda:0")  # 1 GiB, of which each byte is read and written
    assert copy.floor(Times((0.5, 1.0)), 1 << 30) == Times((0.25, 0.5))
