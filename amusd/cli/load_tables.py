"""What ``bench`` prints of a server under load."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from amusd.cli.load import LoadMeasurement
from amusd.cli.measure import SMALLEST_GAIN, reference_of
from amusd.cli.report_table import Column, ReportTable


def show(measurements: Sequence[LoadMeasurement], title: str) -> None:
    """Print one line per strategy: throughput, and percentiles of latencies in milliseconds."""
    reference = reference_of(measurements)
    table = ReportTable(
        Column("strategy", is_text=True),
        Column("tokens/s"),
        Column("ratio"),
        Column("first p50", rank=1),
        Column("p99", rank=1),
        Column("ms/token p50", rank=2),
        Column("p99", rank=2),
        Column("tok/pass", rank=3),
        Column("failed", rank=4),
        Column("same"),
        title=title,
    )
    for measurement in measurements:
        figures = measurement.report(reference)
        table.add(
            measurement.name,
            f"{figures['tokens_per_second']:.0f}",
            f"{figures['speedup']:.2f}x",
            *_times(figures, "time_to_first_token_ms", ".0f"),
            *_times(figures, "ms_per_token", ".1f"),
            f"{figures['tokens_per_pass']:.2f}" if measurement.done else "-",
            str(len(figures["failures"])),
            "yes" if figures["outputs_identical"] else "NO",
        )
    console = Console(markup=False, highlight=False)
    table.print(console)
    for measurement in measurements:
        for reason in sorted({one.failure for one in measurement.requests if one.failure})[:3]:
            console.print(f"{measurement.name}: {reason}", soft_wrap=True)
    console.print(verdict(measurements), soft_wrap=True)


def verdict(measurements: Sequence[LoadMeasurement]) -> str:
    """Return in one line which strategy gives the most tokens a second."""
    reference = reference_of(measurements)
    best = max(measurements, key=lambda one: one.tokens_per_second)
    ratio = best.tokens_per_second / reference.tokens_per_second
    if len(measurements) == 1:
        return f"{best.name} gives {best.tokens_per_second:.0f} tokens a second."
    if best is reference or ratio < SMALLEST_GAIN:
        return f"Nothing gives more tokens a second than {reference.name}."
    return f"{best.name} gives {ratio:.2f}x the tokens a second of {reference.name}."


def _times(figures: dict[str, Any], name: str, form: str) -> list[str]:
    found = figures.get(name, {})
    return [f"{found[one]:{form}}" if found else "-" for one in ("p50", "p99")]
