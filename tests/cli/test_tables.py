"""Tables of measurements: whole at 80 columns, with a verdict below."""

import pytest

from amusd.analysis.consistency import Comparison, Difference, Tie
from amusd.analysis.generation_statistics import SourceAcceptance
from amusd.cli import consistency_command
from amusd.cli.measure import Measurement, Sample
from amusd.cli.tables import show, verdict
from amusd.protocol.draft_source import DraftSource
from tests.cli.test_measure import Replay, statistics

SOURCES = tuple(SourceAcceptance(source, 500, 400, 300) for source in DraftSource)
HEADINGS = (
    "strategy", "tokens", "ms/token", "speed-up", "accept", "tok/pass", "same",
)  # fmt: skip


def measured(name: str, seconds: float, tokens: tuple[int, ...] = (1,) * 12_345) -> Measurement:
    found = statistics(
        num_passes=7000, num_drafted=9000, num_accepted=5000, num_rejected=3000,
        num_rollbacks=30_000, acceptance_per_source=SOURCES,
    )  # fmt: skip
    return Measurement(Replay(name), [Sample(tokens, seconds, found)])


def test_a_table_is_whole_at_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = ("autoregressive", "speculative:12", "transformers assisted")
    show([measured(name, 100.0) for name in names], "3 runs")
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in output
    (headings,) = (line for line in lines if line.split()[:1] == ["strategy"])
    assert tuple(headings.split()) == HEADINGS
    (row,) = (line for line in lines if line.split()[:1] == ["speculative:12"])
    assert row.split()[-1] == "yes"
    assert "accept by source, speculative:12: model 75%, lookup 75%" in lines


def test_the_table_of_consistency_is_whole_at_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    near, far = (Difference(1, 100, 3, 4, Tie(gap, 0.0078)) for gap in (0.00123, 0.0345))
    one = Comparison("exact", "speculative:12", 16, 400, (near,) * 9 + (far,) * 9)
    consistency_command.show([one], "400 outputs")
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    assert "…" not in output
    assert "spacings" in output


@pytest.mark.parametrize(
    ("measurements", "line"),
    [
        (
            [measured("autoregressive", 10.0), measured("amusd", 5.0)],
            "amusd is 2.00x as fast as autoregressive; all outputs are the same",
        ),
        (
            [measured("amusd", 5.0), measured("autoregressive", 4.0)],
            "Nothing is faster than autoregressive; all outputs are the same",
        ),
        (
            [measured("autoregressive", 10.0, (1,)), measured("amusd", 5.0, (2,))],
            "amusd is 2.00x as fast as autoregressive; amusd: outputs differ from autoregressive",
        ),
    ],
)
def test_a_verdict_names_the_fastest_and_what_differs(
    measurements: list[Measurement], line: str
) -> None:
    assert verdict(measurements) == line
