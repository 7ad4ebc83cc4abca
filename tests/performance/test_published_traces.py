"""The performance model against traces that others measured on other hardware."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.trace_check import Fit, TraceRun, TraceSample, check, load_runs

ROOT = Path(__file__).parents[2]
TRACES = Path(
    os.environ.get("AMUSD_TEST_TRACES", ROOT.parent / "shared/data/pipespec-humaneval-traces.json")
)


@pytest.mark.skipif(not TRACES.is_file(), reason="no trace file; AMUSD_TEST_TRACES names it")
def test_runs_that_took_no_part_in_the_fit_are_predicted_within_ten_percent() -> None:
    """Ten requests of each run of four look-aheads; the command checks all."""
    runs = [
        replace(run, samples=run.samples[:10])
        for run in load_runs(TRACES)
        if run.lookahead in (0, 2, 8, 20)
    ]
    _, checked = check(runs)
    held_out = [one for one in checked if not one.is_fitted]
    assert len(held_out) == 5
    errors = {one.run.name: round(one.error, 3) for one in held_out if abs(one.error) > 0.1}
    assert not errors


def run_of(seconds: float, num_rounds: int) -> TraceRun:
    return TraceRun(
        ("a-1B-x", "a-8B-x"), False, 1, (TraceSample(seconds, 1, 0.1, 0.1, (1,) * num_rounds),)
    )


def test_the_fit_finds_the_times_of_starts_and_rounds() -> None:
    counts = (5, 20, 80)
    fit = Fit.of([run_of(1.0 + 0.3 + 0.01 * count, count) for count in counts], [1.0] * 3)
    assert (fit.start_seconds, fit.round_seconds) == pytest.approx((0.3, 0.01))


def test_the_fit_has_no_negative_times() -> None:
    counts = (5, 20, 80)
    fit = Fit.of([run_of(1.3 - 0.001 * count, count) for count in counts], [1.0] * 3)
    assert fit.round_seconds == 0.0
    assert 0.2 < fit.start_seconds < 0.3
