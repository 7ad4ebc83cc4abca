"""``amusd up``: all three services on this machine until Ctrl-C."""

import contextlib
import dataclasses
import signal
import time
from types import FrameType
from typing import Annotated

import typer

from amusd.cli.common_options import DraftModel, Lookup, VerifyModel, errors
from amusd.cli.engine_options import CacheMib, MaxBatch, NumericsChoice, ReusePrefixes
from amusd.cli.local_services import LocalSettings, local_services
from amusd.cli.logging_setup import LogLevel
from amusd.engine.interface import EngineOptions, Numerics, WeightFormat

_POLL_SECONDS = 0.2


def up(
    draft: DraftModel = "smollm2",
    verify: VerifyModel = "smollm2",
    lookup: Lookup = None,
    draft_device: Annotated[
        str, typer.Option(help="Device of the draft: cpu, cuda:1, or auto.")
    ] = "auto",
    verify_device: Annotated[
        str, typer.Option(help="Device of the verify model: cpu, cuda:0, or auto.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="Number format of the weights, or auto.")] = "auto",
    max_batch: MaxBatch = 32,
    cache_mib: CacheMib = 0,
    reuse_prefixes: ReusePrefixes = True,
    numerics: NumericsChoice = Numerics.FAST,
    draft_weights: Annotated[
        WeightFormat, typer.Option(help="How the draft's weights are kept.")
    ] = WeightFormat.COMPACT,
    verify_weights: Annotated[
        WeightFormat,
        typer.Option(help="How the verify model's weights are kept; int8 changes the output."),
    ] = WeightFormat.COMPACT,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the orchestrator.")] = 50050,
    draft_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the draft.")] = 50051,
    verify_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the verify service.")
    ] = 50052,
    metrics_port: Annotated[
        int,
        typer.Option(
            min=0,
            max=65533,
            help="First of three ports that serve /metrics: of orchestrator, draft and verify "
            "service; 0: none.",
        ),
    ] = 0,
    log_level: LogLevel = LogLevel.INFO,
) -> None:
    """Run draft, verify and orchestrator on loopback; Ctrl-C stops them."""
    verify_options = EngineOptions(max_batch, cache_mib, reuse_prefixes, numerics, verify_weights)
    settings = LocalSettings(
        draft=draft,
        verify=verify,
        lookup=lookup,
        draft_device=draft_device,
        verify_device=verify_device,
        dtype=dtype,
        draft_options=dataclasses.replace(verify_options, weights=draft_weights),
        verify_options=verify_options,
        ports=(port, draft_port, verify_port),
        metrics_ports=(metrics_port, metrics_port + 1, metrics_port + 2)
        if metrics_port
        else (0, 0, 0),
        log_level=log_level,
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    with contextlib.suppress(KeyboardInterrupt), local_services(settings) as services:
        print(f"serving on {services.address}; stop with Ctrl-C", flush=True)
        while True:
            services.check()
            time.sleep(_POLL_SECONDS)
    errors.print("all services have stopped")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
