"""``amusd plan``: what each strategy is expected to reach, by simulation."""

import enum
import importlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import amusd
from amusd.cli.bench_figures import BenchFigures, load_bench
from amusd.cli.common_options import Force, check_output, write_report
from amusd.cli.plan_options import (
    Acceptance,
    BranchChance,
    DraftMs,
    DraftRoundTrip,
    MessageMs,
    RoundTrip,
    VerifyMs,
    VerifyRoundTrip,
)
from amusd.cli.report_table import Column, ReportTable
from amusd.cli.server_choice import errors
from amusd.performance.deployment import Branching, Deployment, MessageSeconds
from amusd.performance.planning import Plan, make_plan, pays_per_device, verdict
from amusd.protocol.errors import PreconditionError

_DRAFT_SCALES = (0.25, 0.5, 2.0, 4.0)
_PLOTTED_ACCEPTANCES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_PLOTTED_RATIOS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
_PLOT_SHARE = 4  # a point of the plot simulates a fourth of the tokens


class PlotOver(enum.Enum):
    """What the x axis of the plot shows."""

    ACCEPTANCE = "acceptance"
    DRAFT = "draft"


def plan(
    draft_ms: DraftMs = None,
    verify_ms: VerifyMs = None,
    acceptance: Acceptance = None,
    bench_file: Annotated[
        Path | None,
        typer.Option("--from", help="Report of amusd bench with what the options above leave out."),
    ] = None,
    rtt: RoundTrip = 0.5,
    draft_rtt: DraftRoundTrip = None,
    verify_rtt: VerifyRoundTrip = None,
    message_ms: MessageMs = 0.2,
    branch_chance: BranchChance = 0.0,
    sessions: Annotated[
        int, typer.Option(min=1, max=256, help="Sessions that share both devices.")
    ] = 1,
    tokens: Annotated[
        int, typer.Option(min=50, max=100_000, help="Simulated tokens of each session.")
    ] = 1000,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG to write; needs matplotlib.")] = None,
    force: Force = False,
    plot_over: Annotated[
        PlotOver, typer.Option(help="X axis: acceptance, or draft step over verify pass.")
    ] = PlotOver.ACCEPTANCE,
) -> None:
    """Predict the speed of all strategies from step times, acceptance and message times.

    It simulates the session logic of the services. Prompts and the way to the client take no time.
    """
    check_output(output, force)
    check_output(plot, force)
    if plot is not None:
        _check_matplotlib()
    bench = load_bench(bench_file) if bench_file is not None else None
    messages = MessageSeconds.by_hop(
        draft_hop=_one_way(rtt if draft_rtt is None else draft_rtt),
        verify_hop=_one_way(rtt if verify_rtt is None else verify_rtt),
        overhead=1e-3 * message_ms,
    )
    deployment = Deployment(
        _given("--draft-ms", draft_ms, bench and bench.draft),
        _given("--verify-ms", verify_ms, bench and bench.verify),
        _given("--acceptance", acceptance and acceptance.by_place, bench and bench.acceptance),
        messages,
        sessions,
        Branching.of_total(branch_chance) if branch_chance else None,
    )
    with errors.status("simulating"):
        found = make_plan(deployment, tokens, _DRAFT_SCALES)
        if plot is not None:
            _draw(plot, plot_over, deployment, max(1, tokens // _PLOT_SHARE))
    _show(found, bench)
    if output is not None:
        write_report(output, _report(found, bench))


def _one_way(round_trip_ms: float) -> float:
    return 1e-3 * round_trip_ms / 2


def _given(flag: str, value: Any, found: Any) -> Any:
    """Return the value of an option, else what the report says; refuse if there is neither."""
    if value is None and found is None:
        raise typer.BadParameter(f"{flag} is missing: give it, or a report with --from")
    return found if value is None else value


def _check_matplotlib() -> None:
    """Raise PreconditionError if matplotlib is missing, before anything is simulated."""
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise PreconditionError(
            "the plot needs matplotlib, which is not installed: pip install 'amusd[timeline]'"
        ) from None


def _show(found: Plan, bench: BenchFigures | None) -> None:
    console = Console(markup=False, highlight=False)
    measured = bench.measured_seconds if bench is not None else {}
    _strategies(found).print(console)
    bound_ms = 1e3 * found.bound_seconds_per_token
    console.print(f"zero-latency bound: {bound_ms:.2f} ms/token")
    if measured:
        others = ", ".join(f"{name} {1e3 * one:.2f}" for name, one in measured.items())
        console.print(f"measured, in ms/token with prompts: {others}")
    _draft_sizes(found).print(console)
    console.print(verdict(found))
    if found.fastest.num_devices > 1 and not pays_per_device(found):
        console.print("Plain decoding gives more tokens per device.")


def _strategies(found: Plan) -> ReportTable:
    table = ReportTable(
        Column("strategy", is_text=True),
        Column("ahead", rank=4),
        Column("ms/token"),
        Column("speed-up"),
        Column("tokens/s", rank=2),
        Column("a device", rank=1),
        Column("of bound", rank=3),
    )
    plain = found.forecast("autoregressive")
    for one in found.forecasts:
        table.add(
            one.name,
            str(one.lookahead) if one.lookahead else "-",
            f"{1e3 * one.seconds_per_token:.2f}",
            f"{plain.seconds_per_token / one.seconds_per_token:.2f}x",
            f"{one.tokens_per_second:.1f}",
            f"{one.tokens_per_second_per_device:.1f}",
            f"{found.bound_seconds_per_token / one.seconds_per_token:.0%}",
        )
    return table


def _draft_sizes(found: Plan) -> ReportTable:
    table = ReportTable(
        Column("another draft", is_text=True),
        Column("is as fast at an acceptance of", is_text=True),
    )
    for one in found.draft_sizes:
        needed = "none is enough"
        if one.acceptance is not None:
            needed = _listed(one.acceptance)
        step_ms = 1e3 * found.deployment.draft.scaled(one.draft_scale).of(1)
        table.add(f"step of {step_ms:.3g} ms ({one.draft_scale:g}x)", needed)
    return table


def _listed(acceptance: Sequence[float]) -> str:
    return ", ".join(f"{one:.2f}" for one in acceptance)


def _report(found: Plan, bench: BenchFigures | None) -> dict[str, Any]:
    deployment = found.deployment
    return {
        "amusd": amusd.__version__,
        "deployment": {
            "draft_seconds": dict(
                zip(deployment.draft.sizes, deployment.draft.seconds, strict=True)
            ),
            "verify_seconds": dict(
                zip(deployment.verify.sizes, deployment.verify.seconds, strict=True)
            ),
            "acceptance": deployment.acceptance,
            "message_seconds": asdict(deployment.messages),
            "sessions": deployment.num_sessions,
            "branching": asdict(deployment.branching) if deployment.branching else None,
        },
        "strategies": [
            {**asdict(one), "tokens_per_second_per_device": one.tokens_per_second_per_device}
            for one in found.forecasts
        ],
        "bound_seconds_per_token": found.bound_seconds_per_token,
        "draft_sizes": [asdict(one) for one in found.draft_sizes],
        "measured_seconds_per_token": bench.measured_seconds if bench is not None else {},
        "verdict": verdict(found),
    }


def _draw(path: Path, over: PlotOver, deployment: Deployment, num_tokens: int) -> None:
    from amusd.cli.plan_plot import draw  # noqa: PLC0415  # it loads matplotlib, an extra

    if over is PlotOver.ACCEPTANCE:
        label, values = "acceptance", _PLOTTED_ACCEPTANCES
        setups = [replace(deployment, acceptance=(one,)) for one in values]
    else:
        label, values = "time of a draft step / time of a verify pass", _PLOTTED_RATIOS
        now = deployment.draft.of(1) / deployment.verify.of(1)
        setups = [replace(deployment, draft=deployment.draft.scaled(one / now)) for one in values]
    draw(path, label, values, [make_plan(setup, num_tokens) for setup in setups])
