"""Options of an engine on the command line, and the flags that hand them on to a service."""

from typing import Annotated, Literal

import typer

from amusd.engine.interface import EngineOptions, Numerics, WeightFormat

MaxBatch = Annotated[
    int,
    typer.Option(
        envvar="AMUSD_MAX_BATCH",
        min=1,
        help="Most sessions that share a pass; a synthetic model's name says its own.",
    ),
]
CacheMib = Annotated[
    int,
    typer.Option(
        envvar="AMUSD_CACHE_MIB",
        min=0,
        help="Memory for keys and values of all sessions, in MiB; 0: half of what is free.",
    ),
]
ReusePrefixes = Annotated[
    bool,
    typer.Option(
        "--reuse-prefixes/--no-reuse-prefixes",
        envvar="AMUSD_REUSE_PREFIXES",
        help="Compute what several prompts begin with (a system prompt) only once.",
    ),
]
NumericsChoice = Annotated[
    Numerics,
    typer.Option(
        "--numerics",
        envvar="AMUSD_NUMERICS",
        help="fast; or exact: the same bits whatever shares a pass, so that not even a near tie "
        "of two tokens depends on it.",
    ),
]
Weights = Annotated[
    WeightFormat,
    typer.Option(
        envvar="AMUSD_WEIGHTS",
        help="How weights are kept: compact (smaller without loss, where that is possible), plain, "
        "or int8: faster, but with loss. As a verify model that is another model: int8 changes "
        "the output.",
    ),
]


def flags_of(role: Literal["draft", "verify"], options: EngineOptions | None) -> list[str]:
    """Return the flags with which ``amusd serve`` takes ``options``; none for None."""
    if options is None:
        return []
    flags = ["--max-batch", str(options.max_batch), "--cache-mib", str(options.cache_mib)]
    flags.append("--reuse-prefixes" if options.reuse_prefixes else "--no-reuse-prefixes")
    flags += ["--weights", options.weights]
    if role == "verify":
        flags += ["--numerics", options.numerics]
    return flags
