"""AMUSD against the other strategies on synthetic models of chosen agreement and step times.

Run it on an idle machine: ``python -m benchmarks.synthetic_grid --output grid.json``.
"""

import contextlib
import json
import statistics
import sys
from collections.abc import Callable, Sequence
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
from amusd.policy.speculation_policy import AsynchronousPolicy
from amusd.prompts import Prompt
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.strategy import Strategy

if not __package__:  # run as a file: Python has only its folder on the path
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.delaying_proxy import delaying_proxy

STRATEGIES = (
    "autoregressive,speculative:1,speculative:2,speculative:3,speculative:5,speculative:8,amusd"
)
PUBLISHED = "published"
"""Names the strategy amusd with the policy of the AMUSD paper."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination of the grid; ``ratio`` is draft step over verify pass.

    Messages take ``latency_ms`` longer each way, between draft service and orchestrator and between
    orchestrator and verify service. With ``alternatives`` the draft gives as many next-best tokens,
    and drafts up to 32 branches at a time in the same steps.
    """

    agreement: float
    ratio: float
    pass_ms: float
    alternatives: int = 0
    latency_ms: float = 0.0

    def settings(self, route: Callable[[str], str], policy: AsynchronousPolicy) -> LocalSettings:
        """Return the services that run it; the orchestrator reaches the others by ``route``."""
        draft_ms = self.ratio * self.pass_ms
        return LocalSettings(
            route=route,
            speculation_policy=policy,
            draft=f"synthetic:agreement={self.agreement},pass_ms={draft_ms},vocabulary=4096"
            + (f",batch=33,alternatives={self.alternatives}" if self.alternatives else ""),
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
        str,
        typer.Option(help="Strategies to measure, amusd among them; published: as in the paper."),
    ] = STRATEGIES,
    pass_ms: Annotated[float, typer.Option(help="Time of a verify pass, in ms.")] = 40.0,
    latency_ms: Annotated[
        str, typer.Option(help="One-way latencies in ms to add to each hop, as 0,10.")
    ] = "0",
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
    choices = _parse_choices(strategies)
    grid = [
        Cell(agreement, ratio, pass_ms, alternatives, latency)
        for latency in _numbers(latency_ms, "latencies")
        for agreement in _numbers(agreements, "agreements")
        for ratio in _numbers(ratios, "ratios")
    ]
    if any(cell.latency_ms < 0 for cell in grid):
        raise InvalidInputError("a latency is negative: give 0 or more ms")
    cells = [_measure_cell(cell, choices, num_prompts, max_tokens) for cell in grid]
    shares = [cell["share_of_bound"] for cell in cells]
    _show(cells)
    mean, lowest = statistics.mean(shares), min(shares)
    print(f"share of the zero-latency bound: mean {mean:.1%}, lowest {lowest:.1%}")
    speedups = _speedups(cells)
    for name, found in speedups.items():
        mean_speedup, least = found["geometric_mean"], found["lowest"]
        print(f"amusd against {name}: geometric mean {mean_speedup:.2f}x, lowest {least:.2f}x")
    report = {
        **provenance(),
        "num_prompts": num_prompts,
        "max_tokens": max_tokens,
        "alternatives": alternatives,
        "mean_share_of_bound": mean,
        "lowest_share_of_bound": lowest,
        "speedups": speedups,
        "cells": cells,
    }
    if output is not None:
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _parse_choices(strategies: str) -> list[StrategyChoice]:
    """Return the strategies to measure; the one named ``PUBLISHED`` has its own services."""
    choices: list[StrategyChoice] = []
    for name in filter(None, (part.strip().lower() for part in strategies.split(","))):
        if name == PUBLISHED:
            choices.append(StrategyChoice(PUBLISHED, Strategy.AMUSD))
        else:
            choices += parse_strategies(name)
    if not any(_is_amusd(choice) for choice in choices):
        raise InvalidInputError("the grid compares amusd with others: name it in --strategies")
    return choices


def _is_amusd(choice: StrategyChoice) -> bool:
    return choice.strategy is Strategy.AMUSD and choice.name != PUBLISHED


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
    with contextlib.ExitStack() as stack:
        ours = _served(stack, cell, AsynchronousPolicy.ADAPTIVE)
        if any(choice.name == PUBLISHED for choice in choices):
            published = _served(stack, cell, AsynchronousPolicy.PUBLISHED)
        measurements = measure(
            [choice.runner(published if choice.name == PUBLISHED else ours) for choice in choices],
            prompts,
            max_tokens,
        )
    reference = reference_of(measurements)
    runs = [measurement.report(reference) for measurement in measurements]
    is_amusd = [_is_amusd(choice) for choice in choices]
    amusd_ms = measurements[is_amusd.index(True)].ms_per_token
    return {
        "agreement": cell.agreement,
        "ratio": cell.ratio,
        "pass_ms": cell.pass_ms,
        "latency_ms": cell.latency_ms,
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


def _served(stack: contextlib.ExitStack, cell: Cell, policy: AsynchronousPolicy) -> Client:
    """Return a client of services with the cell's models and latency, for the ``stack``."""

    def route(address: str) -> str:
        if not cell.latency_ms:
            return address
        return stack.enter_context(delaying_proxy(address, 1e-3 * cell.latency_ms))

    services = stack.enter_context(local_services(cell.settings(route, policy)))
    return stack.enter_context(Client(services.address))


def _speedups(cells: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return AMUSD's speed-up over the published policy and the best look-ahead of each cell."""
    over = [cell["amusd_speedup_over"] for cell in cells]
    found = {
        "published": [one[PUBLISHED] for one in over if PUBLISHED in one],
        "the best speculative look-ahead": [
            min(lookaheads)
            for one in over
            if (lookaheads := [one[name] for name in one if name.startswith("speculative")])
        ],
    }
    return {
        name: {"geometric_mean": statistics.geometric_mean(values), "lowest": min(values)}
        for name, values in found.items()
        if values
    }


def _show(cells: Sequence[dict[str, Any]]) -> None:
    table = Table(title="AMUSD's speed-up over each strategy (above 1: AMUSD is faster)")
    names = list(cells[0]["amusd_speedup_over"])
    for heading in (
        "hop ms",
        "agree",
        "d/v",
        *(name.replace("speculative", "spec") for name in names),
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("ms/token", "of bound", "same"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cell in cells:
        table.add_row(
            f"{cell['latency_ms']:g}",
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
