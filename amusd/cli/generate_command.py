"""``amusd generate``: streams the answer to one prompt."""

from typing import Annotated

import typer

from amusd.analysis.generation_statistics import Statistics
from amusd.cli.common_options import (
    Address,
    DraftModel,
    Lookahead,
    Lookup,
    Raw,
    UseProxy,
    VerifyModel,
    errors,
    server,
)
from amusd.cli.tables import shares
from amusd.client import Client, Options
from amusd.prompts import Prompt
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.strategy import Strategy

_MAX_TIMEOUT_SECONDS = 1e9  # beyond this, gRPC cannot add it to the time of day


def _check_timeout(seconds: float) -> float:
    """Refuse what is no time to wait, NaN included."""
    if not 0 < seconds <= _MAX_TIMEOUT_SECONDS:
        raise typer.BadParameter(f"{seconds} is out of range, use more than 0, up to 1e9")
    return seconds


def generate(
    prompt: Annotated[str, typer.Argument(help="Question, or with --raw text to continue.")],
    strategy: Annotated[
        Strategy | None,
        typer.Option(help="Decoding strategy.", show_default="the server's default"),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum output tokens.", show_default="the server's default"),
    ] = None,
    lookahead: Lookahead = None,
    raw: Raw = False,
    address: Address = "",
    use_proxy: UseProxy = False,
    draft: DraftModel = "smollm2",
    verify: VerifyModel = "smollm2",
    lookup: Lookup = None,
    timeout: Annotated[
        float,
        typer.Option(callback=_check_timeout, help="Timeout of the generation, in seconds."),
    ] = 600.0,
) -> None:
    """Stream the model's answer to PROMPT."""
    if not prompt:
        raise InvalidInputError("the prompt is empty: write at least one character")
    options = Options(strategy=strategy, max_tokens=max_tokens, lookahead=lookahead)
    with server(address, draft, verify, lookup) as at, Client(at, timeout, use_proxy) as client:
        generation = client.generate(Prompt(text=prompt) if raw else Prompt.chat(prompt), options)
        for piece in generation:
            print(piece, end="", flush=True)
        print()
        errors.print(_line(generation.summary()), style="dim", highlight=False)


def _line(statistics: Statistics) -> str:
    """Return the statistics of a generation as one line."""
    tokens, seconds = statistics.num_output_tokens, statistics.wall_seconds
    by_source = shares(statistics.acceptance_per_source)
    line = (
        f"{tokens} tokens in {seconds:.2f} s ({1e3 * seconds / max(1, tokens):.1f} ms a token), "
        f"{statistics.tokens_per_pass:.2f} tokens a pass, "
        f"acceptance {statistics.acceptance_rate:.0%}{f' ({by_source})' if by_source else ''}, "
        f"{statistics.num_rollbacks} rollbacks"
    )
    if statistics.num_cached_prompt_tokens:
        line += (
            f", {statistics.num_cached_prompt_tokens} of {statistics.num_prompt_tokens} prompt "
            "tokens cached"
        )
    if statistics.fallback_reason:
        line += f"; decoded without a draft: {statistics.fallback_reason}"
    return line
