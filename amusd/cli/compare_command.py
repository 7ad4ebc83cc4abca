"""``amusd compare``: one prompt with every strategy, side by side."""

from typing import Annotated

import typer

from amusd.cli.common_options import (
    Address,
    DraftModel,
    Lookup,
    MaxTokens,
    Raw,
    VerifyModel,
    errors,
    server,
)
from amusd.cli.measure import StrategyChoice, measure, parse_strategies, reference_of
from amusd.cli.tables import show
from amusd.client import Client
from amusd.prompts import Prompt
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.strategy import Strategy
from amusd.rpc import codec


def compare(
    prompt: Annotated[str, typer.Argument(help="What to answer, or with --raw to continue.")],
    strategies: Annotated[
        str, typer.Option(help="Which to compare, as amusd,speculative:3; empty: all there are.")
    ] = "",
    max_tokens: MaxTokens = 128,
    repeat: Annotated[int, typer.Option(min=1, help="Times to run each, in turns.")] = 3,
    raw: Raw = False,
    address: Address = "",
    draft: DraftModel = "smollm2",
    verify: VerifyModel = "smollm2",
    lookup: Lookup = None,
    timeout: Annotated[float, typer.Option(help="Seconds for each answer.")] = 600.0,
) -> None:
    """Decode PROMPT with every strategy: same output? how fast? Exit code 1 if it differs."""
    if not prompt:
        raise InvalidInputError("the prompt is empty: write at least one character")
    prompts = [Prompt(text=prompt) if raw else Prompt.chat(prompt)] * repeat
    choices = parse_strategies(strategies) if strategies else []
    with server(address, draft, verify, lookup) as at, Client(at, timeout) as client:
        runners = [choice.runner(client) for choice in choices or _all_there_are(client)]
        with errors.status("decoding"):
            measurements = measure(runners, prompts, max_tokens)
    show(measurements, f"{repeat} runs of up to {max_tokens} tokens")
    reference = reference_of(measurements)
    if not all(one.same_outputs(reference) for one in measurements):
        errors.print("the outputs differ", style="red")
        raise typer.Exit(1)


def _all_there_are(client: Client) -> list[StrategyChoice]:
    known = client.server_info().strategies
    found = [codec.strategy_from_proto(one, Strategy.AMUSD) for one in known]
    return [StrategyChoice(strategy.value, strategy) for strategy in found]
