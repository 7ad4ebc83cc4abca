"""Tables of measurements for the terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from amusd.analysis.generation_statistics import SourceAcceptance
from amusd.cli.measure import Measurement, reference_of


def shares(sources: Sequence[SourceAcceptance]) -> str:
    """Return the acceptance of each source as text; empty if fewer than two were checked."""
    checked = [one for one in sources if one.num_checked]
    if len(checked) < 2:
        return ""
    return ", ".join(
        f"{one.source.value} {one.num_accepted / one.num_checked:.0%}" for one in checked
    )


def empty_table(names: Sequence[str], figures: Sequence[str], title: str = "") -> Table:
    """Return a table without rows: columns of names, which may break, and of figures, which do not.

    So a terminal of 80 columns shows all headings and figures.
    """
    table = Table(title=title or None, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in names:
        table.add_column(heading, overflow="fold")
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def show(measurements: Sequence[Measurement], title: str) -> None:
    """Print one line per measurement, and which is the fastest."""
    reference = reference_of(measurements)
    headings = ("tokens", "ms/token", "speed-up", "accept", "tok/pass", "rollbacks", "same")
    table = empty_table(["strategy"], headings, title)
    for measurement in measurements:
        figures = measurement.report(reference)
        is_served = "passes" in figures
        table.add_row(
            measurement.runner.name,
            str(figures["tokens"]),
            f"{figures['ms_per_token']:.1f}",
            f"{figures['speedup']:.2f}x",
            f"{figures['acceptance_rate']:.0%}" if figures.get("drafted") else "-",
            f"{figures['tokens_per_pass']:.2f}" if is_served else "-",
            str(figures["rollbacks"]) if is_served else "-",
            "yes" if figures["outputs_identical"] else "NO",
        )
    console = Console(markup=False, highlight=False)
    console.print(table)
    for measurement in measurements:
        sources = shares(measurement.acceptance_per_source())
        if sources:
            console.print(f"accept by source, {measurement.runner.name}: {sources}")
    if len(measurements) > 1:
        console.print(verdict(measurements))


def verdict(measurements: Sequence[Measurement]) -> str:
    """Return in one line which measurement is the fastest, and whether all outputs are the same."""
    reference = reference_of(measurements)
    fastest = min(measurements, key=lambda one: one.ms_per_token)
    line = f"fastest: {fastest.runner.name}"
    if fastest is not reference:
        speedup = reference.ms_per_token / fastest.ms_per_token
        line += f", {speedup:.2f}x {reference.runner.name}"
    differing = [one.runner.name for one in measurements if not one.same_outputs(reference)]
    if differing:
        return f"{line}; {', '.join(differing)}: outputs differ from {reference.runner.name}"
    return f"{line}; all outputs are the same"
