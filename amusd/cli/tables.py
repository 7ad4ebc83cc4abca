"""What ``compare`` and ``bench`` print of their measurements."""

from collections.abc import Sequence

from rich.console import Console

from amusd.analysis.generation_statistics import SourceAcceptance
from amusd.cli.measure import SMALLEST_GAIN, Measurement, quartiles, reference_of
from amusd.cli.report_table import Column, ReportTable


def shares(sources: Sequence[SourceAcceptance]) -> str:
    """Return the acceptance of each source as text; empty if fewer than two were checked."""
    checked = [one for one in sources if one.num_checked]
    if len(checked) < 2:
        return ""
    return ", ".join(
        f"{one.source.value} {one.num_accepted / one.num_checked:.0%}" for one in checked
    )


def show(measurements: Sequence[Measurement], title: str) -> None:
    """Print one line per measurement, and a verdict."""
    reference = reference_of(measurements)
    table = ReportTable(
        Column("strategy", is_text=True),
        Column("tokens", rank=3),
        Column("ms/token"),
        Column("speed-up"),
        Column("accept", rank=1),
        Column("tok/pass", rank=2),
        Column("rollbacks", rank=4),
        Column("same"),
        title=title,
    )
    for measurement in measurements:
        figures = measurement.report(reference)
        is_served = "passes" in figures
        table.add(
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
    table.print(console)
    for measurement in measurements:
        by_source = shares(measurement.acceptance_per_source())
        if by_source:
            console.print(f"accept by source, {measurement.runner.name}: {by_source}")
    console.print(verdict(measurements), soft_wrap=True)


def verdict(measurements: Sequence[Measurement]) -> str:
    """Return in one line which runner is the fastest, by how much, and if the outputs agree."""
    reference = reference_of(measurements)
    fastest = min(measurements, key=lambda one: one.ms_per_token)
    ratio = reference.ms_per_token / fastest.ms_per_token
    if fastest is reference or ratio < SMALLEST_GAIN:
        found = f"Nothing is faster than {reference.runner.name}"
        if len(measurements) == 1:
            found = f"{reference.runner.name} takes {reference.ms_per_token:.1f} ms a token"
    else:
        low, _, high = _ratios(reference, fastest)
        found = f"{fastest.runner.name} is {ratio:.2f}x as fast as {reference.runner.name}"
        if len(fastest.samples) > 1:
            found += f" (half of the prompts between {low:.2f}x and {high:.2f}x)"
    if len(measurements) == 1:
        return found
    differing = [one.runner.name for one in measurements if not one.same_outputs(reference)]
    if differing:
        return f"{found}; {', '.join(differing)}: outputs differ from {reference.runner.name}"
    return f"{found}; all outputs are the same"


def _ratios(reference: Measurement, other: Measurement) -> list[float]:
    """Return the quartiles of the prompts' speed-ups."""
    pairs = zip(reference.samples, other.samples, strict=True)
    return quartiles([one.ms_per_token / two.ms_per_token for one, two in pairs])
