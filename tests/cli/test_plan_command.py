"""``amusd plan``: its table, its files, and what it refuses."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from amusd.cli.app import app
from amusd.cli.bench_figures import load_bench
from amusd.cli.usage_errors import run_app
from amusd.protocol.errors import InvalidInputError

GIVEN = ("--draft-ms", "1", "--verify-ms", "1:8,8:9", "--acceptance", "0.7,0.8", "--tokens", "60")


def run_of(name: str, ms: float, places: list[tuple[int, int]], **more: Any) -> dict[str, Any]:
    positions = [{"checked": checked, "accepted": accepted} for checked, accepted in places]
    return {"strategy": name, "tokens": 100, "ms_per_token": ms, "verify_busy": 0.5,
            "draft_busy": 0.25, "passes": 50, "drafted": 80,
            "acceptance_per_position": positions, **more}  # fmt: skip


@pytest.fixture(name="bench")
def _bench(tmp_path: Path) -> Path:
    path = tmp_path / "bench.json"
    runs = [
        run_of("autoregressive", 10.0, [], passes=100, drafted=0),
        run_of("speculative:2", 8.0, [(50, 40), (40, 30)]),
        run_of("amusd", 6.0, [(50, 40), (40, 30), (20, 1)]),
        {"strategy": "transformers", "tokens": 100, "ms_per_token": 12.0},
    ]
    path.write_text(json.dumps({"runs": runs}))
    return path


def outcome(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["amusd", "plan", *words])
    monkeypatch.setattr(sys.modules["__main__"], "__package__", "")
    return run_app(app)


def test_the_table_fits_80_columns_and_ends_with_what_pays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = tmp_path / "plan.json"
    words = (*GIVEN, "--branch-chance", "0.8", "--output", str(report))
    assert outcome(monkeypatch, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    found = json.loads(report.read_text())
    assert lines[-1].strip() in (found["verdict"], "Plain decoding gives more tokens per device.")
    names = [one["name"] for one in found["strategies"]]
    assert len(names) == 5
    for name in names:
        assert any(line.strip().startswith(name) for line in lines)
    assert found["deployment"]["verify_seconds"] == pytest.approx({"1": 0.008, "8": 0.009})


def test_a_plot_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    assert outcome(monkeypatch, *GIVEN, "--plot", str(picture), "--plot-over", "draft") == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_bench_report_gives_times_and_acceptance(bench: Path) -> None:
    found = load_bench(bench)
    assert found.draft.seconds == pytest.approx((0.25 * 0.8 / 80,))
    assert found.verify.sizes == (1, 3)
    assert found.verify.seconds == pytest.approx((0.5 * 1.0 / 100, 0.5 * 0.8 / 50))
    assert found.acceptance == pytest.approx((0.8, 0.75))
    assert found.measured_seconds == pytest.approx(
        {"autoregressive": 0.01, "speculative:2": 0.008, "amusd": 0.006}
    )


def test_places_that_were_rarely_compared_are_pooled(bench: Path) -> None:
    report = json.loads(bench.read_text())
    places = [(60, 30), (40, 20), (20, 15), (10, 10)]
    report["runs"][1] = run_of("speculative:4", 8.0, places)
    bench.write_text(json.dumps(report))
    assert load_bench(bench).acceptance == pytest.approx((0.5, 45 / 70))


def test_options_go_before_the_report(
    bench: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = tmp_path / "plan.json"
    words = ("--from", str(bench), "--draft-ms", "3", "--tokens", "60", "--output", str(output))
    assert outcome(monkeypatch, *words) == 0
    found = json.loads(output.read_text())
    assert found["deployment"]["draft_seconds"] == {"1": 0.003}
    assert found["deployment"]["acceptance"] == pytest.approx([0.8, 0.75])
    assert found["measured_seconds_per_token"]["amusd"] == pytest.approx(0.006)


@pytest.mark.parametrize("content", ["{", "[]", '{"runs": []}', '{"runs": [{"passes": 1}]}'])
def test_a_file_that_is_no_bench_report_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(content)
    with pytest.raises(InvalidInputError, match="no report of amusd bench"):
        load_bench(path)


def test_a_missing_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot read"):
        load_bench(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ((), "--draft-ms is missing"),
        (("--draft-ms", "1"), "--verify-ms is missing"),
        (("--draft-ms", "fast"), "'fast' is no time in ms"),
        (("--draft-ms", "0"), "above 0"),
        (("--draft-ms", "nan"), "above 0"),
        (("--verify-ms", "4:8,1:9"), "ascending"),
        (("--verify-ms", "1:8,4:7"), "cannot take less time"),
        (("--acceptance", "1.5"), "'1.5' is no acceptance"),
        (("--acceptance", "0.5,x"), "'0.5,x' is no acceptance"),
        (("--rtt", "-1"), "--rtt: -1 is no time in ms"),
        (("--rtt", "nan"), "--rtt: nan is no time in ms"),
        (("--branch-chance", "2"), "--branch-chance: "),
        (("--sessions", "0"), "--sessions: "),
    ],
)
def test_wrong_values_are_refused_in_one_line_with_exit_code_2(
    words: tuple[str, ...],
    error: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert outcome(monkeypatch, *words) == 2
    seen = capsys.readouterr().err
    assert error in seen
    assert seen.count("\n") == 1
