"""``amusd bench``: measures strategies on many prompts, interleaved, and writes a report."""

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from amusd.cli.common_options import (
    Address,
    DraftModel,
    Lookup,
    MaxTokens,
    UseProxy,
    VerifyModel,
    check_output,
)
from amusd.cli.local_services import LocalSettings, place
from amusd.cli.machine import provenance
from amusd.cli.measure import Measurement, Runner, measure, parse_strategies, reference_of
from amusd.cli.server_choice import errors, server
from amusd.cli.tables import show
from amusd.client import Client
from amusd.prompts import load_prompts
from amusd.protocol.errors import InvalidInputError

TRANSFORMERS = "transformers"


def bench(
    prompts: Annotated[
        str, typer.Option(help="JSONL with prompt, messages or turns per line; or humaneval.")
    ],
    strategies: Annotated[
        str, typer.Option(help="Comma-separated, as autoregressive,speculative:3,amusd.")
    ] = "autoregressive,speculative,amusd",
    max_tokens: MaxTokens = 128,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of prompts.")] = 10,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    baseline: Annotated[
        str, typer.Option(help="Baseline to measure in the same run: transformers.")
    ] = "",
    address: Address = "",
    use_proxy: UseProxy = False,
    draft: DraftModel = "smollm2",
    verify: VerifyModel = "smollm2",
    lookup: Lookup = None,
    timeout: Annotated[float, typer.Option(help="Timeout of each generation, in seconds.")] = 600.0,
) -> None:
    """Measure strategies on many prompts; all strategies decode a prompt before the next one."""
    if baseline not in ("", TRANSFORMERS):
        raise InvalidInputError(f"unknown baseline {baseline!r}: use {TRANSFORMERS}")
    if baseline and address:
        raise InvalidInputError(
            "a baseline needs services that this command starts: leave --address out"
        )
    check_output(output)
    loaded = load_prompts(prompts, limit)
    choices = parse_strategies(strategies)
    with server(address, draft, verify, lookup) as at, Client(at, timeout, use_proxy) as client:
        runners: list[Runner] = [choice.runner(client) for choice in choices]
        if baseline:
            runners += _baselines(draft, verify)
        info = MessageToDict(client.server_info(), preserving_proto_field_name=True)
        with _progress() as progress:
            task = progress.add_task("decoding", total=len(runners) * len(loaded))
            measurements = measure(runners, loaded, max_tokens, lambda: progress.advance(task))
    show(measurements, f"{len(loaded)} prompts of {prompts}, up to {max_tokens} tokens")
    if output is not None:
        report = _report(measurements, info, prompts, max_tokens)
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _baselines(draft: str, verify: str) -> list[Runner]:
    """Return runners of Transformers on the cores of the verify service."""
    from amusd.cli.baseline import transformers_runners  # noqa: PLC0415  # it loads torch

    _, verify_place = place(LocalSettings(draft=draft, verify=verify))
    with errors.status("loading the models for Transformers"):
        return list(transformers_runners(draft, verify, verify_place))


def _report(
    measurements: list[Measurement], info: dict[str, Any], prompts: str, max_tokens: int
) -> dict[str, Any]:
    for role in ("verify_model", "draft_model"):
        with contextlib.suppress(KeyError):
            del info[role]["vocabulary"]
    reference = reference_of(measurements)
    return {
        **provenance(),
        "server": info,
        "prompts": prompts,
        "num_prompts": len(reference.samples),
        "max_tokens": max_tokens,
        "runs": [measurement.report(reference) for measurement in measurements],
    }


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=errors,
    )
