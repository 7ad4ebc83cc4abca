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


def show(measurements: Sequence[Measurement], title: str) -> None:
    """Print one line per measurement."""
    reference = reference_of(measurements)
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("strategy", no_wrap=True)
    for heading in ("tokens", "ms/token", "speed-up", "accept", "tok/pass", "rollbacks", "same"):
        table.add_column(heading, justify="right", no_wrap=True)
    by_source = [shares(measurement.acceptance_per_source()) for measurement in measurements]
    if any(by_source):
        table.add_column("accept by source")
    for measurement, sources in zip(measurements, by_source, strict=True):
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
            *([sources] if any(by_source) else []),
        )
    Console(markup=False).print(table)
