"""Options of what a service tells of itself: metrics, traces, and how its log looks."""

from typing import Annotated

import typer

from amusd.observe.log_format import LogFormat

MetricsPort = Annotated[
    int,
    typer.Option(
        envvar="AMUSD_METRICS_PORT",
        min=0,
        max=65535,
        help="Port of --host that serves /metrics for Prometheus; 0: none.",
    ),
]
TracesEndpoint = Annotated[
    str,
    typer.Option(
        envvar="OTEL_EXPORTER_OTLP_ENDPOINT",
        help="OTLP collector (gRPC) that takes traces, as http://host:4317; empty: no traces.",
    ),
]
Format = Annotated[
    LogFormat,
    typer.Option(
        "--log-format", envvar="AMUSD_LOG_FORMAT", help="text for people, or json: one a line."
    ),
]
