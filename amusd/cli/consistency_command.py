"""``amusd consistency``: whether all strategies and batch sizes give the same output."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from amusd.analysis.consistency import Comparison, Difference, Output, differences
from amusd.cli.common_options import (
    DraftModel,
    Force,
    Lookup,
    MaxTokens,
    VerifyModel,
    check_output,
    progress_bar,
    write_report,
)
from amusd.cli.local_services import LocalSettings, local_services, place
from amusd.cli.machine import provenance
from amusd.cli.measure import Runner, Sample, ServiceRunner, StrategyChoice, parse_strategies
from amusd.cli.report_table import Column, ReportTable
from amusd.cli.server_choice import errors
from amusd.client import Client
from amusd.engine.interface import EngineOptions, Numerics
from amusd.fleet.model_description import is_synthetic
from amusd.prompts import Prompt, load_prompts
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.strategy import Strategy

Configuration = tuple[str, int]
"""The name of a strategy, and the number of concurrent generations."""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What to compare, on which models."""

    settings: LocalSettings
    prompts: Sequence[Prompt]
    strategies: Sequence[StrategyChoice]
    batch_sizes: Sequence[int]
    max_tokens: int
    timeout: float
    reuse_prefixes: bool = False

    def options(self, numerics: Numerics) -> EngineOptions:
        """Return the engine options of the verify model."""
        return EngineOptions(
            max_batch=max(self.batch_sizes), numerics=numerics, reuse_prefixes=self.reuse_prefixes
        )


def consistency(
    prompts: Annotated[
        str, typer.Option(help="JSONL with prompt, messages or turns per line; or humaneval.")
    ],
    numerics: Annotated[str, typer.Option(help="Comma-separated numerics.")] = "fast,exact",
    strategies: Annotated[
        str, typer.Option(help="Comma-separated, as autoregressive,speculative:3,amusd.")
    ] = "autoregressive,speculative,amusd",
    batch_sizes: Annotated[
        str,
        typer.Option(
            help="Concurrent generations, comma-separated. Prompts repeat if there are fewer. "
            "The reference runs with 1."
        ),
    ] = "1,8",
    max_tokens: MaxTokens = 128,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of prompts.")] = 10,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    force: Force = False,
    draft: DraftModel = "smollm2",
    verify: VerifyModel = "smollm2",
    lookup: Lookup = None,
    dtype: Annotated[str, typer.Option(help="Dtype: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, typer.Option(help="Device of both models: auto, cpu, cuda:0.")] = "auto",
    reuse_prefixes: Annotated[
        bool,
        typer.Option(
            help="Reuse cached prefixes. Without it every output computes its own prompt, so that "
            "only strategy and batch size can make a difference."
        ),
    ] = False,
    timeout: Annotated[float, typer.Option(help="Timeout of each generation, in seconds.")] = 600.0,
) -> None:
    """Compare the outputs of strategies and batch sizes with autoregressive decoding at batch 1.

    Numerics exact guarantees identical outputs: exit code 1 if one differs.
    """
    check_output(output, force)
    sizes = _sizes(batch_sizes)
    wanted = _numerics(numerics)
    settings = LocalSettings(
        draft=draft,
        verify=verify,
        lookup=lookup,
        draft_device=device,
        verify_device=device,
        dtype=dtype,
    )
    loaded = load_prompts(prompts, limit)
    chosen = parse_strategies(strategies)
    plan = Plan(settings, loaded, chosen, sizes, max_tokens, timeout, reuse_prefixes)
    found = [one for name in wanted for one in _compare(plan, name)]
    show(found, f"{len(loaded)} prompts of {prompts}, up to {max_tokens} tokens")
    if output is not None:
        report = _report(plan, prompts, found)
        write_report(output, report)
    if any(one.differences for one in found if one.numerics == Numerics.EXACT):
        errors.print("outputs differ with numerics exact", style="red")
        raise typer.Exit(1)


def _sizes(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= 64 for part in parts):
        raise InvalidInputError(
            f"cannot read batch sizes {text!r}: give numbers from 1 to 64, as 1,8"
        )
    return [int(part) for part in parts]


def _numerics(text: str) -> list[Numerics]:
    try:
        return [Numerics(part.strip()) for part in text.split(",")]
    except ValueError:
        known = ",".join(Numerics)
        raise InvalidInputError(f"cannot read numerics {text!r}: use {known}") from None


def _compare(plan: Plan, numerics: Numerics) -> list[Comparison]:
    """Decode with all strategies and batch sizes under one numerics, and compare."""
    reference, found = _decode(plan, numerics)
    comparisons = compare_all(numerics, reference, found)
    if is_synthetic(plan.settings.verify) or not any(one.differences for one in comparisons):
        return comparisons
    ties = _TieMeter(plan, reference)
    return [ties.measured(one) for one in comparisons]


def _decode(
    plan: Plan, numerics: Numerics
) -> tuple[list[Output], dict[Configuration, list[Sample]]]:
    """Return the outputs of the reference, and the samples of every configuration."""
    settings = dataclasses.replace(
        plan.settings,
        verify_options=plan.options(numerics),
        draft_options=EngineOptions(reuse_prefixes=plan.reuse_prefixes),
    )
    with contextlib.ExitStack() as stack:
        with errors.status(f"starting services, numerics {numerics}"):
            services = stack.enter_context(local_services(settings))
        client = stack.enter_context(Client(services.address, plan.timeout))
        runs = [(choice, size) for choice in plan.strategies for size in plan.batch_sizes]
        num_prompts, progress = len(plan.prompts), stack.enter_context(progress_bar())
        num_outputs = num_prompts + sum(num_prompts * _repeats(num_prompts, n) for _, n in runs)
        task = progress.add_task(f"decoding, numerics {numerics}", total=num_outputs)

        def decode(runner: Runner, size: int) -> list[Sample]:
            return decode_concurrently(
                runner, plan.prompts, size, plan.max_tokens, lambda: progress.advance(task)
            )

        reference = decode(ServiceRunner(client, "reference", Strategy.AUTOREGRESSIVE), 1)
        return [one.tokens for one in reference], {
            (choice.name, size): decode(choice.runner(client), size) for choice, size in runs
        }


def compare_all(
    numerics: Numerics, reference: Sequence[Output], found: Mapping[Configuration, Sequence[Sample]]
) -> list[Comparison]:
    """Compare the samples of every configuration with the outputs of the reference."""
    return [
        Comparison(
            numerics.value,
            strategy,
            batch_size,
            len(samples),
            tuple(differences(reference, [one.tokens for one in samples])),
            sum(bool(one.statistics and one.statistics.fallback_reason) for one in samples),
        )
        for (strategy, batch_size), samples in found.items()
    ]


class _TieMeter:
    """Measures near ties with Transformers, in the served dtype."""

    def __init__(self, plan: Plan, reference: Sequence[Output]) -> None:
        # Transformers takes seconds to import and is needed only after a difference.
        from amusd.engine.loading.model_loading import locate_model  # noqa: PLC0415
        from amusd.engine.near_ties import load_gap_reader  # noqa: PLC0415

        _, where = place(plan.settings)
        name = plan.settings.verify
        location = locate_model(name, "verify")
        with errors.status("measuring how near the ties were"):
            self._ties = load_gap_reader(name, location, where.device, plan.settings.dtype)
        self._prompts = plan.prompts
        self._reference = reference

    def measured(self, comparison: Comparison) -> Comparison:
        """Return the comparison with the ties of its differences."""
        found = tuple(self._with_tie(one) for one in comparison.differences)
        return dataclasses.replace(comparison, differences=found)

    def _with_tie(self, difference: Difference) -> Difference:
        """Return the difference with its tie; there is none if one output ended."""
        if -1 in (difference.expected, difference.found):
            return difference
        before = self._reference[difference.prompt][: difference.index]
        text = [*self._ties.encode(self._prompts[difference.prompt]), *before]
        tie = self._ties.tie(text, difference.expected, difference.found)
        return dataclasses.replace(difference, tie=tie)


def decode_concurrently(
    runner: Runner,
    prompts: Sequence[Prompt],
    batch_size: int,
    max_tokens: int,
    on_sample: Callable[[], None] = lambda: None,
) -> list[Sample]:
    """Decode all prompts, ``batch_size`` at a time; repeat them if there are fewer prompts."""

    def one(prompt: Prompt) -> Sample:
        sample = runner.run(prompt, max_tokens)
        on_sample()
        return sample

    requests = [*prompts] * _repeats(len(prompts), batch_size)
    with ThreadPoolExecutor(batch_size) as pool:
        return list(pool.map(one, requests))


def _repeats(num_prompts: int, batch_size: int) -> int:
    return math.ceil(batch_size / num_prompts)


def _report(plan: Plan, prompts: str, comparisons: Iterable[Comparison]) -> dict[str, Any]:
    settings = plan.settings
    return {
        **provenance(),
        "verify": settings.verify,
        "draft": settings.draft,
        "dtype": settings.dtype,
        "device": settings.verify_device,
        "reuse_prefixes": plan.reuse_prefixes,
        "prompts": prompts,
        "num_prompts": len(plan.prompts),
        "max_tokens": plan.max_tokens,
        "comparisons": [one.report() for one in comparisons],
    }


def show(comparisons: Iterable[Comparison], title: str) -> None:
    """Print one line per configuration, and a note for outputs that used no draft."""
    table = ReportTable(
        Column("numerics", is_text=True),
        Column("strategy", is_text=True),
        Column("batch"),
        Column("differ"),
        Column("first", rank=2),
        Column("median", rank=3),
        Column("gap", rank=1),
        Column("spacings", rank=1),
        title=title,
    )
    notes = []
    for one in comparisons:
        first, median = one.indices or ("-", "-")
        table.add(
            one.numerics,
            one.strategy,
            str(one.batch_size),
            f"{len(one.differences)} of {one.num_outputs}",
            str(first),
            str(median),
            _range(one.gaps),
            _range(one.spacings),
        )
        if one.num_fallbacks:
            name = f"{one.numerics}, {one.strategy}, batch {one.batch_size}"
            notes.append(f"{name}: {one.num_fallbacks} outputs were decoded without the draft")
    table.print()
    print(
        "batch: concurrent generations\n"
        "first, median: index of the first token that differs\n"
        "gap: difference of the two tokens' logits there\n"
        "spacings: the gap in steps of the dtype"
    )
    for note in notes:
        errors.print(note, style="yellow")


def _range(values: tuple[float, float] | None) -> str:
    if values is None:
        return "-"
    low, high = (f"{value:.2g}" for value in values)
    return low if low == high else f"{low}-{high}"
