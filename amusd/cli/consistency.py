"""``amusd consistency``: whether all ways of decoding write the same, and where they do not."""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from amusd.cli.local import LocalSettings, local_services, place
from amusd.cli.measure import ServiceRunner, StrategyChoice, parse_strategies
from amusd.cli.options import DraftModel, Lookup, MaxTokens, VerifyModel, check_output, errors
from amusd.client import Client
from amusd.core.consistency import Comparison, Difference, first_difference
from amusd.core.errors import InvalidInputError
from amusd.core.model import is_synthetic
from amusd.core.strategy import Strategy
from amusd.engine.interface import EngineOptions, Numerics
from amusd.prompts import Prompt, load_prompts

Outputs = list[tuple[int, ...]]


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What to compare, on which models."""

    settings: LocalSettings
    prompts: Sequence[Prompt]
    strategies: Sequence[StrategyChoice]
    batch_sizes: Sequence[int]
    max_tokens: int
    timeout: float


def consistency(
    prompts: Annotated[
        str, typer.Option(help="JSONL with prompt, messages or turns a line; or humaneval.")
    ],
    numerics: Annotated[str, typer.Option(help="Numerics in a row.")] = "fast,exact",
    strategies: Annotated[
        str, typer.Option(help="Strategies in a row, as autoregressive,speculative:3,amusd.")
    ] = "autoregressive,speculative,amusd",
    batch_sizes: Annotated[
        str, typer.Option(help="Generations at once, in a row; the reference is alone.")
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
    timeout: Annotated[float, typer.Option(help="Seconds for each answer.")] = 600.0,
) -> None:
    """Compare the outputs of strategies and batch sizes with plain decoding, one at a time."""
    check_output(output)
    sizes = _sizes(batch_sizes)
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
    plan = Plan(settings, loaded, chosen, sizes, max_tokens, timeout)
    found = [one for name in _numerics(numerics) for one in _compare(plan, name)]
    _show(found, f"{len(loaded)} prompts of {prompts}, up to {max_tokens} tokens")
    if output is not None:
        report = [dataclasses.asdict(one) for one in found]
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


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
    options = EngineOptions(max_batch=max(plan.batch_sizes), numerics=numerics)
    settings = dataclasses.replace(
        plan.settings, verify_options=options, draft_options=EngineOptions()
    )
    with contextlib.ExitStack() as stack:
        with errors.status(f"starting services, numerics {numerics}"):
            services = stack.enter_context(local_services(settings))
        client = stack.enter_context(Client(services.address, plan.timeout))
        with errors.status(f"decoding, numerics {numerics}"):
            plain = ServiceRunner(client, "reference", Strategy.AUTOREGRESSIVE)
            reference = _outputs(plain, plan, 1)
            found = {
                (choice.name, size): _outputs(choice.runner(client), plan, size)
                for choice in plan.strategies
                for size in plan.batch_sizes
            }
    differing = {key: list(_differences(reference, outputs)) for key, outputs in found.items()}
    if any(differing.values()) and not is_synthetic(plan.settings.verify):
        judge = _Judge(plan, reference)
        differing = {key: [judge.judged(one) for one in ones] for key, ones in differing.items()}
    return [
        Comparison(numerics.value, *key, len(reference), tuple(ones))
        for key, ones in differing.items()
    ]


class _Judge:
    """Says how near the ties were, by Transformers in the number format that was served."""

    def __init__(self, plan: Plan, reference: Outputs) -> None:
        # Transformers takes seconds to import: it is seldom needed.
        from amusd.engine.loading import locate_model  # noqa: PLC0415
        from amusd.engine.ties import load_judge  # noqa: PLC0415

        _, where = place(plan.settings)
        name = plan.settings.verify
        location = locate_model(name, "verify")
        with errors.status("measuring how near the ties were"):
            self._ties = load_judge(name, location, where.device, plan.settings.dtype)
        self._prompts = plan.prompts
        self._reference = reference

    def judged(self, difference: Difference) -> Difference:
        """Return the difference with its gap; where one output ended there is none."""
        if -1 in (difference.expected, difference.found):
            return difference
        before = self._reference[difference.prompt][: difference.place]
        text = [*self._ties.encode(self._prompts[difference.prompt]), *before]
        gap = self._ties.gap(text, difference.expected, difference.found)
        return dataclasses.replace(difference, gap=gap)


def _outputs(runner: ServiceRunner, plan: Plan, batch_size: int) -> Outputs:
    """Decode all prompts, ``batch_size`` at once."""
    with ThreadPoolExecutor(batch_size) as pool:
        samples = pool.map(lambda prompt: runner.run(prompt, plan.max_tokens), plan.prompts)
        return [sample.tokens for sample in samples]


def _differences(reference: Outputs, outputs: Outputs) -> Iterator[Difference]:
    for index, (expected, found) in enumerate(zip(reference, outputs, strict=True)):
        difference = first_difference(index, expected, found)
        if difference is not None:
            yield difference


def _show(comparisons: Iterable[Comparison], title: str) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    headings = ("numerics", "strategy", "at once", "outputs", "differ", "first at", "median", "gap")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in headings[:2] else "right")
    for one in comparisons:
        first, median = one.places or ("-", "-")
        gaps = "-" if one.gaps is None else f"{one.gaps[0]:.2g} to {one.gaps[1]:.2g}"
        table.add_row(
            one.numerics,
            one.strategy,
            str(one.batch_size),
            str(one.num_outputs),
            str(len(one.differences)),
            str(first),
            str(median),
            gaps,
        )
    Console().print(table)
