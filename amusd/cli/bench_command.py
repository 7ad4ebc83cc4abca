"""``amusd bench``: measures strategies on many prompts, interleaved, and writes a report."""

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict

from amusd.cli import load_tables
from amusd.cli.common_options import (
    Address,
    ApiKey,
    Ca,
    DraftModel,
    Force,
    Lookup,
    MaxTokens,
    Tls,
    UseProxy,
    VerifyModel,
    check_output,
    progress_bar,
    write_report,
)
from amusd.cli.load import Load, measure_load
from amusd.cli.local_services import LocalSettings, place
from amusd.cli.machine import provenance
from amusd.cli.measure import Runner, measure, parse_strategies, reference_of
from amusd.cli.server_choice import ServerChoice, errors
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
    concurrency: Annotated[
        int, typer.Option(min=1, max=256, help="Most requests at the same time.")
    ] = 1,
    request_rate: Annotated[
        float,
        typer.Option(
            min=0, help="Requests that arrive per second, at random times; 0: one after another."
        ),
    ] = 0.0,
    rounds: Annotated[
        int,
        typer.Option(min=1, max=100, help="How often every strategy gets all prompts under load."),
    ] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    force: Force = False,
    baseline: Annotated[
        str, typer.Option(help="Baseline to measure in the same run: transformers.")
    ] = "",
    address: Address = "",
    use_proxy: UseProxy = False,
    tls: Tls = False,
    ca: Ca = "",
    api_key: ApiKey = "",
    draft: DraftModel = "smollm2",
    verify: VerifyModel = "smollm2",
    lookup: Lookup = None,
    timeout: Annotated[float, typer.Option(help="Timeout of each generation, in seconds.")] = 600.0,
) -> None:
    """Measure strategies on many prompts; all strategies decode a prompt before the next one.

    With --concurrency or --request-rate the strategies take turns with all prompts, and the table
    has tokens per second and latencies in milliseconds.
    """
    load = Load(concurrency, request_rate)
    _check_baseline(baseline, address, load)
    check_output(output, force)
    loaded = load_prompts(prompts, limit)
    choices = parse_strategies(strategies)
    title = f"{len(loaded)} prompts of {prompts}, up to {max_tokens} tokens"
    about: dict[str, Any] = {"prompts": prompts, "max_tokens": max_tokens, **asdict(load)}
    chosen = ServerChoice(address, use_proxy, tls, ca, api_key, draft, verify, lookup, timeout)
    with chosen.client() as client:
        about["server"] = _server(client)
        if load.is_one_by_one:
            runners: list[Runner] = [choice.runner(client) for choice in choices]
            runners += _baselines(draft, verify) if baseline else []
            with progress_bar() as progress:
                task = progress.add_task("decoding", total=len(runners) * len(loaded))
                found = measure(runners, loaded, max_tokens, lambda: progress.advance(task))
            show(found, title)
            runs = [one.report(reference_of(found)) for one in found]
        else:
            with progress_bar() as progress:
                task = progress.add_task("decoding", total=rounds * len(choices) * len(loaded))
                loads = measure_load(
                    client, choices, loaded, max_tokens, load, rounds,
                    lambda: progress.advance(task),
                )  # fmt: skip
            load_tables.show(loads, f"{title}, {load}, {rounds} rounds")
            runs = [one.report(reference_of(loads)) for one in loads]
    if output is not None:
        write_report(output, {**provenance(), **about, "num_prompts": len(loaded), "runs": runs})


def _check_baseline(baseline: str, address: str, load: Load) -> None:
    if baseline not in ("", TRANSFORMERS):
        raise InvalidInputError(f"unknown baseline {baseline!r}: use {TRANSFORMERS}")
    if baseline and address:
        raise InvalidInputError(
            "a baseline needs services that this command starts: leave --address out"
        )
    if baseline and not load.is_one_by_one:
        raise InvalidInputError(
            "a baseline decodes one prompt at a time: leave --concurrency and --request-rate out"
        )


def _baselines(draft: str, verify: str) -> list[Runner]:
    """Return runners of Transformers on the cores of the verify service."""
    from amusd.cli.baseline import transformers_runners  # noqa: PLC0415  # it loads torch

    _, verify_place = place(LocalSettings(draft=draft, verify=verify))
    with errors.status("loading the models for Transformers"):
        return list(transformers_runners(draft, verify, verify_place))


def _server(client: Client) -> dict[str, Any]:
    """Return what the server says of itself, without the hashes of its vocabularies."""
    info: dict[str, Any] = MessageToDict(client.server_info(), preserving_proto_field_name=True)
    for role in ("verify_model", "draft_model"):
        with contextlib.suppress(KeyError):
            del info[role]["vocabulary"]
    return info
