"""``amusd timeline``: the device timelines of one generation, as a trace file and a picture."""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from amusd.analysis.device_timeline import DeviceTimeline, DeviceTimelines, Span, device_timelines
from amusd.analysis.generation_statistics import Statistics
from amusd.analysis.timeline import Timeline
from amusd.cli.common_options import (
    Address,
    ApiKey,
    Ca,
    DraftModel,
    Force,
    Lookahead,
    Lookup,
    MaxTokens,
    Raw,
    Tls,
    UseProxy,
    VerifyModel,
    check_output,
)
from amusd.cli.report_table import Column, ReportTable
from amusd.cli.server_choice import ServerChoice, errors
from amusd.cli.trace_file import trace
from amusd.client import Client, Options
from amusd.prompts import Prompt
from amusd.protocol.errors import InvalidInputError, PreconditionError, UnavailableError
from amusd.protocol.strategy import Strategy


@dataclass(frozen=True, slots=True)
class Record:
    """A generation with its timeline and statistics; ``about`` describes it in the trace file."""

    timeline: Timeline
    devices: DeviceTimelines
    statistics: Statistics
    about: dict[str, Any]


def timeline(
    prompt: Annotated[str, typer.Argument(help="Question, or with --raw text to continue.")],
    output: Annotated[
        Path, typer.Option(help="Files to write: PREFIX.json and PREFIX.png.", metavar="PREFIX")
    ] = Path("timeline"),
    force: Force = False,
    strategy: Annotated[
        Strategy | None,
        typer.Option(help="Decoding strategy.", show_default="the server's default"),
    ] = None,
    max_tokens: MaxTokens = 64,
    lookahead: Lookahead = None,
    from_ms: Annotated[
        float, typer.Option("--from", min=0, help="Start of the picture, in milliseconds.")
    ] = 0.0,
    to_ms: Annotated[
        float | None,
        typer.Option(
            "--to", min=0, help="End of the picture, in milliseconds.", show_default="the end"
        ),
    ] = None,
    raw: Raw = False,
    address: Address = "",
    use_proxy: UseProxy = False,
    tls: Tls = False,
    ca: Ca = "",
    api_key: ApiKey = "",
    draft: DraftModel = "smollm2",
    verify: VerifyModel = "smollm2",
    lookup: Lookup = None,
    timeout: Annotated[float, typer.Option(help="Timeout of the generation, in seconds.")] = 600.0,
) -> None:
    """Decode PROMPT and show when the draft and the verify device worked."""
    if not prompt:
        raise InvalidInputError("the prompt is empty: write at least one character")
    if to_ms is not None and to_ms <= from_ms:
        raise InvalidInputError(f"--to {to_ms:g} is not after --from {from_ms:g}")
    _check_matplotlib()
    trace_path, picture_path = _paths(output, force)
    options = Options(strategy, max_tokens, lookahead, timeline=True)
    chosen = ServerChoice(address, use_proxy, tls, ca, api_key, draft, verify, lookup, timeout)
    with chosen.client() as client:
        record = _record(client, Prompt(text=prompt) if raw else Prompt.chat(prompt), options)
    window = _window(record.devices, from_ms, to_ms)
    found = trace(record.timeline, record.devices, record.about)
    trace_path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    _draw(record, window, picture_path)
    _show(record)
    print(f"wrote {trace_path} (for ui.perfetto.dev) and {picture_path}")


def _check_matplotlib() -> None:
    """Raise PreconditionError if matplotlib is missing, before services start."""
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise PreconditionError(
            "the picture needs matplotlib, which is not installed: pip install 'amusd[timeline]'"
        ) from None


def _paths(prefix: Path, force: bool) -> tuple[Path, Path]:
    """Return the files to write.

    Raises:
        InvalidInputError: a file cannot be written, or exists and ``force`` is not set.
    """
    if not prefix.name:
        raise InvalidInputError(f"{prefix} is a folder: name a file in it to write to")
    paths = (prefix.with_name(f"{prefix.name}.json"), prefix.with_name(f"{prefix.name}.png"))
    for path in paths:
        check_output(path, force)
    return paths


def _record(client: Client, prompt: Prompt, options: Options) -> Record:
    """Generate and return the record.

    Raises:
        UnavailableError: the orchestrator returned no timeline.
    """
    with errors.status("decoding"):
        generation = client.generate(prompt, options).wait()
    if generation.timeline is None:
        raise UnavailableError("the orchestrator returned no timeline")
    statistics = generation.summary()
    info = client.server_info()
    about = {
        "strategy": generation.strategy.value if generation.strategy is not None else "",
        "verify_model": info.verify_model.name,
        "draft_model": info.draft_model.name,
        "num_output_tokens": statistics.num_output_tokens,
        "num_passes": statistics.num_passes,
        "num_rollbacks": statistics.num_rollbacks,
        "wall_seconds": statistics.wall_seconds,
        "is_truncated": generation.timeline.is_truncated,
    }
    return Record(generation.timeline, device_timelines(generation.timeline), statistics, about)


def _window(devices: DeviceTimelines, from_ms: float, to_ms: float | None) -> Span:
    """Return the part of the generation that the picture shows."""
    end_ms = 1e3 * devices.ended_seconds
    if from_ms >= end_ms:
        raise InvalidInputError(
            f"--from {from_ms:g} lies after the end: the generation took {end_ms:.0f} ms"
        )
    return Span(1e-3 * from_ms, 1e-3 * min(end_ms, to_ms if to_ms is not None else end_ms))


def _draw(record: Record, window: Span, path: Path) -> None:
    from amusd.cli.timeline_plot import draw  # noqa: PLC0415  # it loads matplotlib, an extra

    devices = record.devices
    title = (
        f"{_title(record)}: draft busy {_percent(devices.draft.busy_seconds, devices)}, "
        f"verify busy {_percent(devices.verify.busy_seconds, devices)}, "
        f"both {_percent(devices.overlap_seconds, devices)}"
    )
    draw(record.timeline, devices, window, title, path)


def _title(record: Record) -> str:
    statistics = record.statistics
    return (
        f"{record.about['strategy']}, {statistics.num_output_tokens} tokens in "
        f"{1e3 * statistics.wall_seconds:.0f} ms, {statistics.num_rollbacks} rollbacks"
    )


def _percent(seconds: float, devices: DeviceTimelines) -> str:
    return f"{seconds / devices.ended_seconds:.0%}" if devices.ended_seconds else "-"


def _show(record: Record) -> None:
    """Print the use of both devices, and warnings about the timeline."""
    devices = record.devices
    table = ReportTable(
        Column("device", is_text=True),
        *(Column(heading) for heading in ("passes", "busy ms", "busy", "idle ms", "idle")),
        title=_title(record),
    )
    for name, device in (("draft", devices.draft), ("verify", devices.verify)):
        idle_seconds = devices.ended_seconds - device.busy_seconds
        table.add(name, str(len(device.works)), *_time(device.busy_seconds, devices),
                      *_time(idle_seconds, devices))  # fmt: skip
    table.add("both at once", "", *_time(devices.overlap_seconds, devices), "", "")
    table.print()
    if record.timeline.is_truncated:
        errors.print("the timeline is truncated: ask for fewer tokens")
    if record.statistics.fallback_reason:
        errors.print(f"decoded without a draft: {record.statistics.fallback_reason}")
    for name, device, seconds in (
        ("draft", devices.draft, record.statistics.draft_busy_seconds),
        ("verify", devices.verify, record.statistics.verify_busy_seconds),
    ):
        _warn(name, device, seconds)


def _time(seconds: float, devices: DeviceTimelines) -> tuple[str, str]:
    return f"{1e3 * seconds:.0f}", _percent(seconds, devices)


def _warn(name: str, device: DeviceTimeline, busy_seconds: float) -> None:
    if busy_seconds and not device.works:
        errors.print(f"the {name} service reported no times of its work")
    if device.clock_shift_seconds:
        errors.print(
            f"the {name} service's clock is about {1e3 * device.clock_shift_seconds:+.1f} ms off: "
            "its times are corrected by that and are approximate"
        )
