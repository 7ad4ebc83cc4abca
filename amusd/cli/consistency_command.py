"""``amusd consistency``: whether all ways of decoding write the same, and where they do not."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from amusd.analysis.consistency import Comparison, Difference, Output, differences
from amusd.cli.common_options import (
    DraftModel,
    Lookup,
    MaxTokens,
    VerifyModel,
    check_output,
    errors,
)
from amusd.cli.local_services import LocalSettings, local_services, place
from amusd.cli.machine import provenance
from amusd.cli.measure import Runner, Sample, ServiceRunner, StrategyChoice, parse_strategies
from amusd.client import Client
from amusd.engine.interface import EngineOptions, Numerics
from amusd.fleet.model_description import is_synthetic
from amusd.prompts import Prompt, load_prompts
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.strategy import Strategy

Way = tuple[str, int]
"""A strategy by its name, and how many generations run at once."""


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
        """Return how the verify model runs."""
        return EngineOptions(
            max_batch=max(self.batch_sizes), numerics=numerics, reuse_prefixes=self.reuse_prefixes
        )


def consistency(
    prompts: Annotated[
        str, typer.Option(help="JSONL with prompt, messages or turns a line; or humaneval.")
    ],
    numerics: Annotated[str, typer.Option(help="Numerics in a row.")] = "fast,exact",
    strategies: Annotated[
        str, typer.Option(help="Strategies in a row, as autoregressive,speculative:3,amusd.")
    ] = "autoregressive,speculative,amusd",
    batch_sizes: Annotated[
        str,
        typer.Option(
            help="Generations at once, in a row; fewer prompts than that are asked again. "
            "The reference is alone."
        ),
    ] = "1,8",
    max_tokens: MaxTokens = 128,
    limit: Annotated[int, typer.Option(min=1, help="Most prompts.")] = 10,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    draft: DraftModel = "smollm2",
    verify: VerifyModel = "smollm2",
    lookup: Lookup = None,
    dtype: Annotated[
        str, typer.Option(help="Number format: auto, float32, bfloat16, float16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="Device of both models: auto, cpu, cuda:0.")] = "auto",
    reuse_prefixes: Annotated[
        bool,
        typer.Option(
            help="Take over what was computed of a prompt before; else each output reads its own, "
            "so that only strategy and batch size can make a difference."
        ),
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds for each answer.")] = 600.0,
) -> None:
    """Compare the outputs of strategies and batch sizes with plain decoding, one at a time.

    Exit code 1 if an output differs with numerics exact, which promises that none does.
    """
    check_output(output)
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
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if any(one.differences for one in found if one.numerics == Numerics.EXACT):
        errors.print("outputs differ with numerics exact", style="red")
        raise typer.Exit(1)


def _sizes(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= 64 for part in parts):
        raise InvalidInputError(f"cannot read batch sizes {text!r}: write 1 to 64 each, as 1,8")
    return [int(part) for part in parts]


def _numerics(text: str) -> list[Numerics]:
    try:
        return [Numerics(part.strip()) for part in text.split(",")]
    except ValueError:
        known = ",".join(Numerics)
        raise InvalidInputError(f"cannot read numerics {text!r}: use {known}") from None


def _compare(plan: Plan, numerics: Numerics) -> list[Comparison]:
    """Decode in all ways with one numerics, and compare."""
    reference, found = _decode(plan, numerics)
    comparisons = compare_all(numerics, reference, found)
    if is_synthetic(plan.settings.verify) or not any(one.differences for one in comparisons):
        return comparisons
    validate = _Judge(plan, reference)
    return [validate.judged(one) for one in comparisons]


def _decode(plan: Plan, numerics: Numerics) -> tuple[list[Output], dict[Way, list[Sample]]]:
    """Return the reference's outputs, and the samples of every way of decoding."""
    settings = dataclasses.replace(
        plan.settings,
        verify_options=plan.options(numerics),
        draft_options=EngineOptions(reuse_prefixes=plan.reuse_prefixes),
    )
    with contextlib.ExitStack() as stack:
        with errors.status(f"starting services, numerics {numerics}"):
            services = stack.enter_context(local_services(settings))
        client = stack.enter_context(Client(services.address, plan.timeout))
        with errors.status(f"decoding, numerics {numerics}"):
            plain = ServiceRunner(client, "reference", Strategy.AUTOREGRESSIVE)
            reference = [
                one.tokens for one in decode_at_once(plain, plan.prompts, 1, plan.max_tokens)
            ]
            return reference, {
                (choice.name, size): decode_at_once(
                    choice.runner(client), plan.prompts, size, plan.max_tokens
                )
                for choice in plan.strategies
                for size in plan.batch_sizes
            }


def compare_all(
    numerics: Numerics, reference: Sequence[Output], found: Mapping[Way, Sequence[Sample]]
) -> list[Comparison]:
    """Compare the samples of every way of decoding with the reference's outputs."""
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


class _Judge:
    """Says how near the ties were, by Transformers in the number format that was served."""

    def __init__(self, plan: Plan, reference: Sequence[Output]) -> None:
        # Transformers takes seconds to import: it is seldom needed.
        from amusd.engine.loading.model_loading import locate_model  # noqa: PLC0415
        from amusd.engine.near_ties import load_gap_reader  # noqa: PLC0415

        _, where = place(plan.settings)
        name = plan.settings.verify
        location = locate_model(name, "verify")
        with errors.status("measuring how near the ties were"):
            self._ties = load_gap_reader(name, location, where.device, plan.settings.dtype)
        self._prompts = plan.prompts
        self._reference = reference

    def judged(self, comparison: Comparison) -> Comparison:
        """Return the comparison with the ties of its differences."""
        found = tuple(self._with_tie(one) for one in comparison.differences)
        return dataclasses.replace(comparison, differences=found)

    def _with_tie(self, difference: Difference) -> Difference:
        """Return the difference with its tie; where one output ended there is none."""
        if -1 in (difference.expected, difference.found):
            return difference
        before = self._reference[difference.prompt][: difference.place]
        text = [*self._ties.encode(self._prompts[difference.prompt]), *before]
        tie = self._ties.tie(text, difference.expected, difference.found)
        return dataclasses.replace(difference, tie=tie)


def decode_at_once(
    runner: Runner, prompts: Sequence[Prompt], batch_size: int, max_tokens: int
) -> list[Sample]:
    """Decode all prompts, ``batch_size`` at once; where they are fewer, all of them again."""
    asked = [*prompts] * math.ceil(batch_size / len(prompts))
    with ThreadPoolExecutor(batch_size) as pool:
        return list(pool.map(lambda prompt: runner.run(prompt, max_tokens), asked))


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
    """Print one line for each way of decoding, and what makes a line say less than it seems to."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    headings = ("numerics", "strategy", "batch", "differ", "first", "median", "gap", "spacings")
    for heading in headings:
        justify: Literal["left", "right"] = "left" if heading in headings[:2] else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    notes = []
    for one in comparisons:
        first, median = one.places or ("-", "-")
        table.add_row(
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
            way = f"{one.numerics}, {one.strategy}, {one.batch_size} at once"
            notes.append(f"{way}: {one.num_fallbacks} outputs were written without the draft")
    Console().print(table)
    print(
        "batch: generations at once; first, median: place of the first token that differs;\n"
        "gap: between the two tokens' logits there; spacings: in steps of the number format"
    )
    for note in notes:
        errors.print(note, style="yellow")


def _range(values: tuple[float, float] | None) -> str:
    if values is None:
        return "-"
    low, high = (f"{value:.2g}" for value in values)
    return low if low == high else f"{low}-{high}"
