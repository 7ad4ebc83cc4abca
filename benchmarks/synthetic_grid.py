"""AMUSD against the other strategies on synthetic models whose agreement and times are dialled in.

Run it on an idle machine: ``python benchmarks/synthetic_grid.py --output grid.json``.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from amusd.cli import reporting_errors
from amusd.cli.local_services import LocalSettings, local_services
from amusd.cli.measure import Measurement, measure, parse_strategies, reference_of
from amusd.client import Client
from amusd.policy.performance_model import zero_latency_bound_seconds
from amusd.prompts import Prompt

STRATEGIES = (
    "autoregressive,speculative:1,speculative:2,speculative:3,speculative:5,speculative:8,amusd"
)


def main(
    agreements: Annotated[str, typer.Option(help="Chance that a proposed token is right.")] = (
        "0.5,0.75,0.9"
    ),
    ratios: Annotated[str, typer.Option(help="Draft step over verify pass.")] = "0.1,0.25,0.5",
    pass_ms: Annotated[float, typer.Option(help="Time of a verify pass, in ms.")] = 40.0,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each output.")] = 128,
    num_prompts: Annotated[int, typer.Option(help="Outputs of each strategy.")] = 5,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure every combination and print one line for each."""
    cells = [
        _measure_cell(float(agreement), float(ratio), pass_ms, max_tokens, num_prompts)
        for agreement in agreements.split(",")
        for ratio in ratios.split(",")
    ]
    _show(cells)
    if output is not None:
        output.write_text(json.dumps(cells, indent=2) + "\n", encoding="utf-8")


def _measure_cell(
    agreement: float, ratio: float, pass_ms: float, max_tokens: int, num_prompts: int
) -> dict[str, Any]:
    settings = LocalSettings(
        draft=f"synthetic:agreement={agreement},pass_ms={ratio * pass_ms},vocabulary=4096",
        verify=f"synthetic:pass_ms={pass_ms},vocabulary=4096",
    )
    prompts = [Prompt(tokens=(number, number + 1)) for number in range(num_prompts)]
    with local_services(settings) as services, Client(services.address) as client:
        runners = [choice.runner(client) for choice in parse_strategies(STRATEGIES)]
        measurements = measure(runners, prompts, max_tokens)
    reference = reference_of(measurements)
    bound = zero_latency_bound_seconds(agreement, 1e-3 * ratio * pass_ms, lambda _: 1e-3 * pass_ms)
    return {
        "agreement": agreement,
        "ratio": ratio,
        "pass_ms": pass_ms,
        "bound_ms_per_token": 1e3 * bound,
        "runs": [measurement.report(reference) for measurement in measurements],
        "amusd_against_speculative": _ratios(measurements),
    }


def _ratios(measurements: list[Measurement]) -> dict[str, float]:
    """Return how many times faster AMUSD is than each other way of decoding."""
    amusd = measurements[-1].ms_per_token
    return {one.runner.name: one.ms_per_token / amusd for one in measurements[:-1]}


def _show(cells: list[dict[str, Any]]) -> None:
    table = Table(title="AMUSD's speed-up over each strategy (above 1: AMUSD is faster)")
    names = list(cells[0]["amusd_against_speculative"])
    for heading in ("agree", "d/v", *(name.replace("speculative", "spec") for name in names)):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("of bound", justify="right")
    table.add_column("same", justify="right")
    for cell in cells:
        amusd = cell["runs"][-1]
        table.add_row(
            f"{cell['agreement']:.2f}",
            f"{cell['ratio']:.2f}",
            *(f"{cell['amusd_against_speculative'][name]:.2f}" for name in names),
            f"{cell['bound_ms_per_token'] / amusd['ms_per_token']:.0%}",
            "yes" if all(run["outputs_identical"] for run in cell["runs"]) else "NO",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    reporting_errors(lambda: typer.run(main))
