"""The grid of synthetic models measures the chosen strategies."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "benchmarks/synthetic_grid.py", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False, cwd=ROOT
    )


@pytest.mark.slow
@pytest.mark.process
def test_chosen_strategies_are_measured_against_the_bound(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    grid = ["--pass-ms", "4", "--ratios", "0.2,0.5", "--agreements", "0.9"]
    grid += ["--latency-ms", "2"]
    few = [
        "--strategies",
        "amusd,autoregressive,published",
        "--num-prompts",
        "1",
        "--max-tokens",
        "16",
    ]
    done = run(*grid, *few, "--output", str(report))
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    cells = found["cells"]
    assert [(cell["agreement"], cell["ratio"]) for cell in cells] == [(0.9, 0.2), (0.9, 0.5)]
    for cell in cells:
        assert [one["strategy"] for one in cell["runs"]] == [
            "amusd",
            "autoregressive",
            "published",
        ]
        assert all(one["outputs_identical"] for one in cell["runs"])
        assert list(cell["amusd_speedup_over"]) == ["autoregressive", "published"]
        assert cell["latency_ms"] == 2.0
        assert 0 < cell["share_of_bound"] == cell["bound_ms_per_token"] / cell["amusd_ms_per_token"]
    shares = [cell["share_of_bound"] for cell in cells]
    assert found["lowest_share_of_bound"] == min(shares)
    assert found["mean_share_of_bound"] == pytest.approx(sum(shares) / 2)
    over = [cell["amusd_speedup_over"]["published"] for cell in cells]
    assert found["speedups"]["published"]["lowest"] == min(over)
    assert list(found["speedups"]) == ["published"]
    words = f"mean {found['mean_share_of_bound']:.1%}, lowest {min(shares):.1%}"
    assert words in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--strategies", "autoregressive"], "name it in --strategies"),
        (["--strategies", "amusd,fast"], "unknown strategy 'fast'"),
        (["--ratios", "a"], "cannot read ratios 'a'"),
        (["--latency-ms", "-1"], "a latency is negative"),
        (["--output", "/nowhere/report.json"], "no folder /nowhere"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert words in done.stderr
