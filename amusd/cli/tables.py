"""Tables of measurements for people."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from amusd.cli.measure import Measurement, reference_of


def show(measurements: Sequence[Measurement], title: str) -> None:
    """Print one line for each way of decoding."""
    reference = reference_of(measurements)
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("strategy", no_wrap=True)
    for heading in ("tokens", "ms/token", "speed-up", "accept", "tok/pass", "rollbacks", "same"):
        table.add_column(heading, justify="right", no_wrap=True)
    for measurement in measurements:
        figures = measurement.report(reference)
        is_ours = "passes" in figures
        table.add_row(
            measurement.runner.name,
            str(figures["tokens"]),
            f"{figures['ms_per_token']:.1f}",
            f"{figures['speedup']:.2f}x",
            f"{figures['acceptance_rate']:.0%}" if figures.get("drafted") else "-",
            f"{figures['tokens_per_pass']:.2f}" if is_ours else "-",
            str(figures["rollbacks"]) if is_ours else "-",
            "yes" if figures["outputs_identical"] else "NO",
        )
    Console().print(table)
