"""AMUSD against the other strategies on synthetic models of chosen agreement and step times.

Run it on an idle machine: ``python benchmarks/synthetic_grid.py --output grid.json``.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from amusd.cli import reporting_errors
from amusd.cli.common_options import check_output
from amusd.cli.local_services import LocalSettings, local_services
from amusd.cli.machine import provenance
from amusd.cli.measure import StrategyChoice, measure, parse_strategies, reference_of
from amusd.client import Client
from amusd.policy.performance_model import zero_latency_bound_seconds
from amusd.prompts import Prompt
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.strategy import Strategy

STRATEGIES = (
    "autoregressive,speculative:1,speculative:2,speculative:3,speculative:5,speculative:8,amusd"
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination of the grid; ``ratio`` is draft step over verify pass.

    With ``alternatives`` the draft gives as many next-best tokens, and drafts up to 8 branches at a
    time in the same steps.
    """

    agreement: float
    ratio: float
    pass_ms: float
    alternatives: int = 0

    @property
    def settings(self) -> LocalSettings:
        """The services that run it."""
        draft_ms = self.ratio * self.pass_ms
        return LocalSettings(
            draft=f"synthetic:agreement={self.agreement},pass_ms={draft_ms},vocabulary=4096"
            + (f",batch=9,alternatives={self.alternatives}" if self.alternatives else ""),
            verify=f"synthetic:pass_ms={self.pass_ms},vocabulary=4096",
        )

    @property
    def bound_ms_per_token(self) -> float:
        """The least time per token that AMUSD could reach without any latency."""
        pass_seconds = 1e-3 * self.pass_ms
        draft_seconds = self.ratio * pass_seconds
        return 1e3 * zero_latency_bound_seconds(
            self.agreement, draft_seconds, lambda _: pass_seconds
        )


def main(
    agreements: Annotated[
        str, typer.Option(help="Chances that a drafted token is the verify model's, as 0.6,0.9.")
    ] = "0.5,0.75,0.9",
    ratios: Annotated[
        str, typer.Option(help="Times of a draft step over that of a verify pass, as 0.1,0.2.")
    ] = "0.1,0.25,0.5",
    strategies: Annotated[
        str, typer.Option(help="Strategies to measure, amusd among them.")
    ] = STRATEGIES,
    pass_ms: Annotated[float, typer.Option(help="Time of a verify pass, in ms.")] = 40.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each output.")] = 128,
    num_prompts: Annotated[int, typer.Option(min=1, help="Outputs of each strategy.")] = 5,
    alternatives: Annotated[
        int, typer.Option(min=0, help="Next-best tokens of the draft, for branches.")
    ] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure each combination and print one line for it.

    In a combination each prompt goes through all strategies before the next prompt does.
    """
    check_output(output)
    choices = parse_strategies(strategies)
    if not any(choice.strategy is Strategy.AMUSD for choice in choices):
        raise InvalidInputError("the grid compares amusd with others: name it in --strategies")
    grid = [
        Cell(agreement, ratio, pass_ms, alternatives)
        for agreement in _numbers(agreements, "agreements")
        for ratio in _numbers(ratios, "ratios")
    ]
    cells = [_measure_cell(cell, choices, num_prompts, max_tokens) for cell in grid]
    shares = [cell["share_of_bound"] for cell in cells]
    _show(cells)
    mean, lowest = statistics.mean(shares), min(shares)
    print(f"share of the zero-latency bound: mean {mean:.1%}, lowest {lowest:.1%}")
    report = {
        **provenance(),
        "num_prompts": num_prompts,
        "max_tokens": max_tokens,
        "alternatives": alternatives,
        "mean_share_of_bound": mean,
        "lowest_share_of_bound": lowest,
        "cells": cells,
    }
    if output is not None:
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _numbers(text: str, name: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InvalidInputError(f"cannot read {name} {text!r}: give numbers as 0.1,0.2") from None


def _measure_cell(
    cell: Cell, choices: Sequence[StrategyChoice], num_prompts: int, max_tokens: int
) -> dict[str, Any]:
    """Return the figures of a combination; its speed-ups are those of the first AMUSD."""
    prompts = [Prompt(tokens=(number, number + 1)) for number in range(num_prompts)]
    with local_services(cell.settings) as services, Client(services.address) as client:
        measurements = measure([choice.runner(client) for choice in choices], prompts, max_tokens)
    reference = reference_of(measurements)
    runs = [measurement.report(reference) for measurement in measurements]
    is_amusd = [choice.strategy is Strategy.AMUSD for choice in choices]
    amusd_ms = measurements[is_amusd.index(True)].ms_per_token
    return {
        "agreement": cell.agreement,
        "ratio": cell.ratio,
        "pass_ms": cell.pass_ms,
        "bound_ms_per_token": cell.bound_ms_per_token,
        "amusd_ms_per_token": amusd_ms,
        "share_of_bound": cell.bound_ms_per_token / amusd_ms,
        "amusd_speedup_over": {
            one.runner.name: one.ms_per_token / amusd_ms
            for one, amusd in zip(measurements, is_amusd, strict=True)
            if not amusd
        },
        "runs": runs,
    }


def _show(cells: Sequence[dict[str, Any]]) -> None:
    table = Table(title="AMUSD's speed-up over each strategy (above 1: AMUSD is faster)")
    names = list(cells[0]["amusd_speedup_over"])
    for heading in ("agree", "d/v", *(name.replace("speculative", "spec") for name in names)):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("ms/token", "of bound", "same"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cell in cells:
        table.add_row(
            f"{cell['agreement']:.2f}",
            f"{cell['ratio']:.2f}",
            *(f"{cell['amusd_speedup_over'][name]:.2f}" for name in names),
            f"{cell['amusd_ms_per_token']:.2f}",
            f"{cell['share_of_bound']:.0%}",
            "yes" if all(run["outputs_identical"] for run in cell["runs"]) else "NO",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    reporting_errors(lambda: typer.run(main))
