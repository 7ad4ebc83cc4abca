"""Where the time of a rollback cycle goes, through the real services.

Run it on an idle machine: ``python -m benchmarks.hot_path --output hot_path.json``.
"""

import contextlib
import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from amusd.analysis.message_latency import (
    Latency,
    Leg,
    message_counts,
    message_latencies,
    num_late_rollbacks,
)
from amusd.cli import reporting_errors
from amusd.cli.common_options import Address, DraftModel, Lookup, VerifyModel, check_output
from amusd.cli.local_services import LocalSettings, local_services
from amusd.cli.machine import provenance
from amusd.client import Client, Options
from amusd.engine.interface import EngineOptions
from amusd.fleet.model_description import is_synthetic
from amusd.prompts import Prompt, load_prompts
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.strategy import Strategy
from benchmarks.message_floor import FloorTimes, busy_cores, measure_floor
from benchmarks.wakeups import ThreadOf, count_wakeups

_BUILT_IN = (
    "Why is the sky blue?",
    "Give me three tips for learning a new language.",
    "Write a short story about a lighthouse keeper.",
    "Explain how a refrigerator works.",
)
_MESSAGES = ("verdict", "rollback", "advance", "proposal", "forward")


@dataclass(slots=True)
class Found:
    """The sums over all measured generations."""

    latencies: list[Latency] = field(default_factory=list)
    messages: Counter[str] = field(default_factory=Counter)
    wakeups: Counter[ThreadOf] = field(default_factory=Counter)
    num_tokens: int = 0
    wall_seconds: float = 0.0
    num_late_rollbacks: int = 0
    num_truncated: int = 0


def main(
    draft: DraftModel = "smollm2",
    verify: VerifyModel = "smollm2",
    lookup: Lookup = None,
    address: Address = "",
    prompts: Annotated[
        str,
        typer.Option(
            help="JSONL with prompt, messages or turns per line; or humaneval.",
            show_default="built-in ones",
        ),
    ] = "",
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of prompts.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=2, help="Maximum tokens per output.")] = 128,
    repeat: Annotated[int, typer.Option(min=1, help="Generations of each prompt.")] = 1,
    strategy: Annotated[Strategy, typer.Option(help="Decoding strategy.")] = Strategy.AMUSD,
    floor_messages: Annotated[
        int, typer.Option(min=2, help="Messages for the floor of gRPC on this machine.")
    ] = 2000,
    busy_floor: Annotated[
        bool, typer.Option(help="Measure the floor also while all cores are busy.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure the legs of a rollback cycle, its messages and wake-ups, and the floor of gRPC.

    The services must run on this host. With --address no wake-ups are counted.
    """
    check_output(output)
    loaded = load_prompts(prompts, limit) if prompts else _built_in(limit, verify)
    floors = _floors(floor_messages, busy_floor)
    with _services(address, draft, verify, lookup) as (at, pids), Client(at) as client:
        found = _measure(client, loaded * repeat, strategy, max_tokens, pids)
    settings = {
        "draft": draft, "verify": verify, "lookup": lookup, "address": address,
        "prompts": prompts, "num_prompts": len(loaded), "max_tokens": max_tokens,
        "repeat": repeat, "strategy": strategy.value,
    }  # fmt: skip
    report = {**provenance(), "settings": settings, "floor": floors, **_report(found)}
    _show(report, f"{strategy.value}, verify {verify}, draft {draft}")
    if output is not None:
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _built_in(limit: int, verify: str) -> list[Prompt]:
    """Return questions, as plain text for a synthetic model, which has no chat template."""
    ask = (lambda text: Prompt(text=text)) if is_synthetic(verify) else Prompt.chat
    return [ask(text) for text in _BUILT_IN[:limit]]


@contextlib.contextmanager
def _services(
    address: str, draft: str, verify: str, lookup: bool | None
) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield the orchestrator's address, and the process ids by role of services started here."""
    if address:
        yield address, {}
        return
    fresh = EngineOptions(reuse_prefixes=False)
    settings = LocalSettings(draft, verify, lookup, draft_options=fresh, verify_options=fresh)
    with local_services(settings) as services:
        yield services.address, {one.role: one.process.pid for one in services.running}


def _measure(
    client: Client,
    prompts: Sequence[Prompt],
    strategy: Strategy,
    max_tokens: int,
    pids: Mapping[str, int],
) -> Found:
    """Decode all prompts sequentially, after one warm-up generation."""
    options = Options(strategy, max_tokens, timeline=True)
    client.generate(prompts[0], options).wait()
    found = Found()
    for prompt in prompts:
        before = count_wakeups(pids)
        generation = client.generate(prompt, options).wait()
        found.wakeups += count_wakeups(pids) - before
        if generation.timeline is None:
            raise InvalidInputError("the orchestrator records no timeline")
        found.latencies += message_latencies(generation.timeline)
        found.messages += message_counts(generation.timeline)
        found.num_tokens += len(generation.tokens)
        found.wall_seconds += generation.summary().wall_seconds
        found.num_late_rollbacks += num_late_rollbacks(generation.timeline)
        found.num_truncated += generation.timeline.is_truncated
    return found


def _floors(num_messages: int, is_busy_asked: bool) -> dict[str, Any]:
    floors = {"idle": _floor_report(measure_floor(num_messages))}
    if is_busy_asked:
        with busy_cores():
            floors["busy"] = _floor_report(measure_floor(num_messages))
    return floors


def _floor_report(floor: FloorTimes) -> dict[str, Any]:
    round_trip = _quartiles(floor.round_trip_seconds)
    return {
        "stream_round_trip": round_trip,
        "stream_one_way_ms": round_trip["median_ms"] / 2,
        "stream_round_trip_after_pause": _quartiles(floor.paused_round_trip_seconds),
        "unary_call": _quartiles(floor.unary_seconds),
    }


def _report(found: Found) -> dict[str, Any]:
    """Return the figures for a file."""
    return {
        "num_tokens": found.num_tokens,
        "ms_per_token": 1e3 * found.wall_seconds / max(1, found.num_tokens),
        "num_truncated_timelines": found.num_truncated,
        "cycle": _legs([one for one in found.latencies if one.in_cycle]),
        "all_messages": _legs(found.latencies),
        "num_late_rollbacks": found.num_late_rollbacks,
        "messages": {name: found.messages[name] for name in _MESSAGES},
        "messages_per_rollback": _per(found.messages.total(), found.messages["rollback"]),
        "wakeups": _wakeups(found) if found.wakeups else None,
    }


def _legs(latencies: Sequence[Latency]) -> dict[str, Any]:
    """Return quartiles for each leg, and the sum of the medians if every leg was seen."""
    legs = {
        leg.name.lower(): _quartiles([one.seconds for one in latencies if one.leg is leg])
        for leg in Leg
    }
    medians = [leg["median_ms"] for leg in legs.values()]
    return {"legs": legs, "sum_of_medians_ms": None if None in medians else sum(medians)}


def _wakeups(found: Found) -> dict[str, Any]:
    """Return wake-ups per rollback and token: of all threads, and of each."""
    num_rollbacks = found.messages["rollback"]
    threads = [
        {
            "role": thread.role,
            "thread": thread.name,
            "thread_id": thread.thread_id,
            "count": count,
            "per_rollback": _per(count, num_rollbacks),
            "per_token": _per(count, found.num_tokens),
        }
        for thread, count in found.wakeups.most_common()
    ]
    total = found.wakeups.total()
    return {
        "total": total,
        "per_rollback": _per(total, num_rollbacks),
        "per_token": _per(total, found.num_tokens),
        "threads": threads,
    }


def _per(count: int, of: int) -> float | None:
    return count / of if of else None


def _quartiles(seconds: Sequence[float]) -> dict[str, Any]:
    """Return median and quartiles in ms; None without values."""
    if not seconds:
        return {"count": 0, "median_ms": None, "quartiles_ms": None}
    values = [1e3 * one for one in seconds]
    low, _, high = (
        statistics.quantiles(values, n=4, method="inclusive") if values[1:] else values * 3
    )
    return {
        "count": len(values),
        "median_ms": statistics.median(values),
        "quartiles_ms": [low, high],
    }


def _show(report: Mapping[str, Any], title: str) -> None:
    console = Console(width=None if Console().is_terminal else 110)
    console.print(_latency_table(report, title))
    console.print(_count_table(report))


def _latency_table(report: Mapping[str, Any], title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("leg", no_wrap=True)
    for heading in ("ms", "quartiles", "count", "all: ms", "quartiles", "count"):
        table.add_column(heading, justify="right", no_wrap=True)
    cycle, everything = report["cycle"], report["all_messages"]
    for leg in Leg:
        name = leg.name.lower()
        table.add_row(leg.value, *_cells(cycle["legs"][name]), *_cells(everything["legs"][name]))
    table.add_row(
        "sum of medians", _number(cycle["sum_of_medians_ms"]), "", "",
        _number(everything["sum_of_medians_ms"]), "", "", end_section=True,
    )  # fmt: skip
    for state, floor in report["floor"].items():
        table.add_row(f"floor, {state}: stream round trip", *_cells(floor["stream_round_trip"]))
        table.add_row(f"floor, {state}: stream one way", _number(floor["stream_one_way_ms"]))
        paused = floor["stream_round_trip_after_pause"]
        table.add_row(f"floor, {state}: round trip after a pause", *_cells(paused))
        table.add_row(f"floor, {state}: unary call", *_cells(floor["unary_call"]))
    return table


def _count_table(report: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("total", "per rollback", "per token"):
        table.add_column(heading, justify="right", no_wrap=True)
    num_rollbacks, num_tokens = report["messages"]["rollback"], report["num_tokens"]

    def add(name: str, count: int) -> None:
        per = (_number(_per(count, of)) for of in (num_rollbacks, num_tokens))
        table.add_row(name, str(count), *per)

    add("output tokens", num_tokens)
    for name, count in report["messages"].items():
        add(f"messages: {name}", count)
    add("rollbacks after another old step", report["num_late_rollbacks"])
    add("messages", sum(report["messages"].values()))
    if report["wakeups"] is not None:
        by_role: Counter[str] = Counter()
        for thread in report["wakeups"]["threads"]:
            by_role[thread["role"]] += thread["count"]
        for role, count in by_role.items():
            add(f"wake-ups: {role}", count)
        add("wake-ups", report["wakeups"]["total"])
    table.caption = f"{report['ms_per_token']:.2f} ms a token"
    return table


def _cells(times: Mapping[str, Any]) -> tuple[str, str, str]:
    if times["median_ms"] is None:
        return "-", "-", "0"
    low, high = times["quartiles_ms"]
    return _number(times["median_ms"]), f"{low:.2f} to {high:.2f}", str(times["count"])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    reporting_errors(lambda: typer.run(main))
