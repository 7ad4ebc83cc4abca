"""The hot-path benchmark: what it counts, and a run with synthetic models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.message_floor import busy_cores, measure_floor
from benchmarks.wakeups import ThreadOf, count_wakeups

ROOT = Path(__file__).parents[2]
SYNTHETIC = ["--verify", "synthetic:pass_ms=2", "--draft", "synthetic:agreement=0.5,pass_ms=0.5"]


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "benchmarks.hot_path", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False, cwd=ROOT
    )


@pytest.mark.slow
@pytest.mark.process
def test_all_figures_are_measured_and_written(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    few = ["--limit", "1", "--repeat", "2", "--max-tokens", "40", "--floor-messages", "20"]
    done = run(*SYNTHETIC, *few, "--busy-floor", "--output", str(report))
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert found["num_tokens"] == 80
    assert set(found["floor"]) == {"idle", "busy"}
    legs = found["cycle"]["legs"]
    assert list(legs) == ["verdict", "rollback", "proposal", "forward"]
    assert found["cycle"]["sum_of_medians_ms"] == sum(one["median_ms"] for one in legs.values())
    assert all(0 <= leg["median_ms"] < 1000 for leg in legs.values())
    num_rollbacks = found["messages"]["rollback"]
    assert 0 < legs["rollback"]["count"] <= num_rollbacks
    assert found["messages_per_rollback"] == sum(found["messages"].values()) / num_rollbacks
    threads = found["wakeups"]["threads"]
    assert {thread["role"] for thread in threads} == {"orchestrator", "draft", "verify"}
    assert found["wakeups"]["total"] == sum(thread["count"] for thread in threads)
    assert found["wakeups"]["per_rollback"] >= 3  # each message wakes somebody


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output", "/nowhere/report.json"], "no folder /nowhere"),
        (["--prompts", "/nowhere.jsonl"], "cannot read prompts from /nowhere.jsonl"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert words in done.stderr


@pytest.mark.process
def test_the_floor_is_measured_with_another_process_also_beside_busy_cores() -> None:
    idle = measure_floor(5)
    assert len(idle.round_trip_seconds) == len(idle.unary_seconds) == 5
    with busy_cores():
        busy = measure_floor(5)
    assert min(*idle.round_trip_seconds, *busy.unary_seconds) > 0


def test_wakeups_are_counted_for_each_thread_of_each_process(tmp_path: Path) -> None:
    for pid, thread, name, count in ((7, 7, "python", 5), (7, 8, "grpc poller", 3), (9, 9, "x", 0)):
        folder = tmp_path / str(pid) / "task" / str(thread)
        folder.mkdir(parents=True)
        lines = [f"Name:\t{name}", f"voluntary_ctxt_switches:\t{count}", "nonvoluntary:\t99"]
        (folder / "status").write_text("\n".join(lines) + "\n")
    (tmp_path / "7" / "task" / "10").mkdir()  # a thread that has just ended
    assert count_wakeups({"draft": 7, "verify": 9}, tmp_path) == {
        ThreadOf("draft", 7, "python"): 5,
        ThreadOf("draft", 8, "grpc poller"): 3,
        ThreadOf("verify", 9, "x"): 0,
    }
