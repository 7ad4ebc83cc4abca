"""The benchmark of metrics and traces runs and writes its report."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.process
def test_ratios_of_both_strategies_are_written(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    few = ["--no-embedded", "--num-pairs", "2", "--max-tokens", "4"]
    done = subprocess.run(
        [sys.executable, "benchmarks/observation_cost.py", *few, "--output", str(report)],
        capture_output=True, text=True, timeout=200, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert set(found["recording"]) == {"pass_us", "verdict_us"}
    plain, amusd = found["services"].values()
    assert all(len(one["ratios"]) == 2 for one in (plain, amusd))
    # A span a session and service, the warm-up's included; plain decoding needs no draft.
    assert (plain["num_spans"], amusd["num_spans"]) == (6, 9)
