"""``amusd acceptance``: measures the acceptance of drafts and predicts their speed."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from amusd.analysis.acceptance import Share
from amusd.cli.common_options import Force, check_output, write_report
from amusd.cli.report_table import Column, ReportTable
from amusd.cli.server_choice import errors
from amusd.engine.loading.device import DeviceSettings
from amusd.prompts import load_prompts

if TYPE_CHECKING:
    from amusd.distill.draft_measurement import DraftReport


def acceptance(
    draft: Annotated[list[str], typer.Option(help="Draft model; repeat the option for several.")],
    verify: Annotated[str, typer.Option(help="Verify model.")],
    prompts: Annotated[str, typer.Option(help="JSONL file of prompts, or humaneval.")],
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of prompts.")] = 20,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 128,
    temperature: Annotated[
        float,
        typer.Option(min=0, help="Also measure sampling at this temperature; 0: greedy only."),
    ] = 0.0,
    draws: Annotated[int, typer.Option(min=1, help="Noise draws per sampled answer.")] = 4,
    lookahead: Annotated[int, typer.Option(min=1, help="Positions of a pass to report.")] = 8,
    answers: Annotated[
        Path | None,
        typer.Option(help="File that caches the verify model's greedy answers."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda:0, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="Threads on CPU; 0: PyTorch's choice.")] = 1,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    force: Force = False,
) -> None:
    """Measure how often drafts agree with the verify model, and predict the speed.

    Acceptance is teacher-forced on the verify model's answers. Times are measured on this device.
    With several drafts, the table marks the best one for each strategy.
    """
    check_output(output, force)
    texts = tuple(load_prompts(prompts, limit))
    # Transformers takes seconds to import, so arguments are checked first.
    from amusd.distill.draft_measurement import Bench, MeasurePlan  # noqa: PLC0415

    plan = MeasurePlan(
        verify=verify,
        prompts=texts,
        max_tokens=max_tokens,
        temperature=temperature,
        draws=draws,
        lookahead=lookahead,
        answers=answers,
        device=DeviceSettings(device, dtype, threads),
    )
    with errors.status(Text(f"{verify} answers {len(texts)} prompts")):
        bench = Bench(plan)
    reports = []
    for name in draft:
        with errors.status(Text(f"measuring {name}")):
            reports.append(bench.measure(name))
    passes = [bench.pass_seconds(n) for n in range(lookahead + 1)]
    _show(reports, passes)
    if output is not None:
        drafts = [asdict(report) for report in reports]
        write_report(output, {"pass_seconds": passes, "drafts": drafts})


def _show(reports: Sequence["DraftReport"], passes: Sequence[float]) -> None:
    table = ReportTable(
        Column("draft", is_text=True),
        Column("layers", rank=3),
        Column("M read", rank=4),
        Column("step", rank=2),
        Column("greedy"),
        Column("sampled", rank=5),
        Column("speculative", rank=1),
        Column("amusd"),
    )
    fastest = min(report.speculative.seconds for report in reports)
    soonest = min(report.asynchronous.seconds for report in reports)
    for report in reports:
        table.add(
            report.draft,
            str(report.num_layers),
            f"{report.num_computed / 1e6:.1f}",
            f"{1e3 * report.draft_seconds:.1f}",
            _percent(report.greedy),
            _percent(report.sampled) if report.sampled else "-",
            _predicted(report.speculative.seconds, report.speculative.num_proposed, fastest),
            _predicted(report.asynchronous.seconds, report.asynchronous.num_proposed, soonest),
        )
    console = Console(markup=False)
    table.print(console)
    times = ", ".join(f"{1e3 * seconds:.1f}" for seconds in passes)
    console.print(
        "step: ms per draft step; greedy, sampled: share of accepted tokens, 95 % interval;\n"
        "speculative, amusd: predicted ms per token (speculation length), * is the best draft\n"
        f"verify pass over 0 to {len(passes) - 1} drafted tokens, ms: {times}"
    )
    for report in reports:
        rates = ", ".join(
            f"{one.num_accepted / one.num_checked:.0%}" if one.num_checked else "-"
            for one in report.acceptance_per_position
        )
        console.print(f"{report.draft}, greedy acceptance per position of a pass: {rates}")


def _percent(share: Share) -> str:
    return f"{share.value:.1%} ±{(share.high - share.low) / 2:.0%}"


def _predicted(seconds: float, num_proposed: int, best: float) -> str:
    return f"{1e3 * seconds:.1f} ({num_proposed}){'*' if seconds == best else ' '}"
