"""All tables about the engine and the services: ``python -m benchmarks --output report.json``.

Run it on an idle machine. The README in this folder explains each table.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from amusd.cli import reporting_errors
from amusd.cli.common_options import check_output
from amusd.cli.machine import provenance
from amusd.engine.interface import WeightFormat
from amusd.engine.loading.device import parse_cpus
from amusd.fleet.model_description import is_synthetic
from amusd.prompts import Prompt, load_prompts
from amusd.protocol.errors import InvalidInputError
from benchmarks import engine_tables, gpu, sampling_cost, service_tables
from benchmarks.engine_tables import Contestants, TableOfFigures
from benchmarks.engines import Bench, verify_cores

ENGINE = ("one-token", "passes", "bandwidth", "sessions", "numerics", "sampling")
SERVICES = ("strategies", "clients")
GPU = ("gpu-verify", "gpu-draft", "gpu-exact")
TABLES = (*ENGINE, *SERVICES, *GPU)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure, on which models and cores, and how often."""

    verify: str
    draft: str
    rounds: int
    prompts: list[Prompt]
    max_tokens: int
    cpus: tuple[int, ...]
    weights: tuple[WeightFormat, ...]
    clients: tuple[int, ...]


def main(
    verify: Annotated[str, typer.Option(help="Verify model.")] = "smollm2",
    draft: Annotated[str, typer.Option(help="Draft model of the strategies.")] = "smollm2",
    only: Annotated[
        str, typer.Option(help=f"Tables, comma-separated: {', '.join(TABLES)}.", show_default="all")
    ] = "",
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds of each table; whole texts take a fifth as many.")
    ] = 15,
    cpus: Annotated[
        str,
        typer.Option(
            help="Cores of the engine tables, as 0 or 0-3, one thread each.",
            show_default="the cores of a verify service that runs with a draft",
        ),
    ] = "",
    weights: Annotated[
        str, typer.Option(help="Formats of the engine's weights: compact, plain, int8.")
    ] = ",".join(engine_tables.FORMATS),
    prompts: Annotated[
        str, typer.Option(help="Prompts for the tables strategies and clients.")
    ] = "humaneval",
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of prompts.")] = 10,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each output.")] = 128,
    clients: Annotated[
        str, typer.Option(help="Numbers of concurrent clients of the table clients, as 1,8.")
    ] = "1,2,4,8",
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure and print the tables; write all figures to a file."""
    check_output(output)
    wanted = _wanted(only)
    if is_synthetic(verify):
        raise InvalidInputError("a synthetic model has no engine to measure: name a real one")
    loaded = load_prompts(prompts, limit) if set(wanted) & set(SERVICES) else []
    cores = parse_cpus(cpus) or verify_cores()
    plan = Plan(
        verify, draft, rounds, loaded, max_tokens, cores, _formats(weights), _counts(clients)
    )
    report = _head(plan, prompts)
    for name, make in _makers(plan):
        if name not in wanted:
            continue
        if name in GPU and not torch.cuda.is_available():
            report["tables"][name] = "not measured: there is no GPU"
            print(f"{name}: not measured because there is no GPU\n")
        else:
            table = make()
            _show(table)
            report["tables"][name] = table.figures
        if output is not None:  # after each table, so that an interrupted run keeps its tables
            output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _wanted(only: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in only.split(",")) if only else TABLES
    unknown = [name for name in names if name not in TABLES]
    if unknown:
        raise InvalidInputError(f"unknown table {unknown[0]!r}: use {', '.join(TABLES)}")
    return names


def _formats(text: str) -> tuple[WeightFormat, ...]:
    try:
        return tuple(WeightFormat(part.strip()) for part in text.split(","))
    except ValueError:
        raise InvalidInputError(
            f"cannot read weights {text!r}: use {','.join(WeightFormat)}"
        ) from None


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise InvalidInputError(f"cannot read clients {text!r}: give numbers from 1 on, as 1,2,4,8")
    return counts


def _makers(plan: Plan) -> Iterator[tuple[str, Callable[[], TableOfFigures]]]:
    """Yield the tables; services come first because they inherit the cores of this thread."""
    settings = service_tables.settings_of(plan.draft, plan.verify)
    rounds, max_tokens = plan.rounds, plan.max_tokens
    few = max(1, rounds // 5)
    yield "strategies", lambda: service_tables.strategies(settings, plan.prompts, max_tokens)
    yield (
        "clients",
        lambda: service_tables.clients(settings, plan.prompts, max_tokens, few, plan.clients),
    )
    contestants = _LazyContestants(Bench(plan.verify, cpus=plan.cpus), plan.weights)
    yield "one-token", lambda: engine_tables.one_token(contestants.get(), few)
    yield "passes", lambda: engine_tables.passes(contestants.get(), rounds)
    yield "bandwidth", lambda: engine_tables.bandwidth(contestants.get(), rounds)
    yield "sessions", lambda: engine_tables.sessions(contestants.get(), rounds)
    bfloat16 = Bench(plan.verify, "bfloat16", plan.cpus)
    yield "numerics", lambda: engine_tables.numerics(_prepared(bfloat16), rounds)
    plain = Bench(plan.verify, cpus=plan.cpus)
    yield "sampling", lambda: sampling_cost.sampling(_prepared(plain), rounds)
    yield "gpu-verify", lambda: gpu.large("cuda:0", rounds)
    yield "gpu-draft", lambda: gpu.small("cuda:0", rounds)
    yield "gpu-exact", lambda: gpu.exact("cuda:0", rounds)


class _LazyContestants:
    """The models that the engine tables share, loaded when the first table needs them."""

    def __init__(self, bench: Bench, formats: tuple[WeightFormat, ...]) -> None:
        self._bench = bench
        self._formats = formats
        self._loaded: Contestants | None = None

    def get(self) -> Contestants:
        if self._loaded is None:
            self._loaded = Contestants.of(_prepared(self._bench), self._formats)
        return self._loaded


def _prepared(bench: Bench) -> Bench:
    bench.prepare()
    return bench


def _head(plan: Plan, prompts: str) -> dict[str, Any]:
    """Return a report without tables: machine, versions and settings."""
    head = provenance()
    head["machine"]["gpu"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    settings = {
        "verify": plan.verify,
        "draft": plan.draft,
        "rounds": plan.rounds,
        "prompts": prompts,
        "num_prompts": len(plan.prompts),
        "max_tokens": plan.max_tokens,
        "engine_cpus": list(plan.cpus),
        "weights": list(plan.weights),
    }
    return head | {"settings": settings, "tables": {}}


def _show(table: TableOfFigures) -> None:
    shown = Table(title=table.title, box=box.SIMPLE_HEAD)
    for heading in table.headings:
        shown.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for row in table.rows:
        shown.add_row(*row)
    Console(width=None if Console().is_terminal else 140).print(shown)


if __name__ == "__main__":
    reporting_errors(lambda: typer.run(main))
