"""``amusd compare``: decodes one prompt with every strategy and compares output and speed."""

from typing import Annotated

import typer

from amusd.cli.common_options import (
    Address,
    ApiKey,
    Ca,
    DraftModel,
    Lookup,
    MaxTokens,
    Raw,
    Tls,
    UseProxy,
    VerifyModel,
    progress_bar,
)
from amusd.cli.measure import StrategyChoice, measure, parse_strategies, reference_of
from amusd.cli.server_choice import ServerChoice, errors
from amusd.cli.tables import show
from amusd.client import Client
from amusd.prompts import Prompt
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.strategy import Strategy
from amusd.rpc import codec


def compare(
    prompt: Annotated[str, typer.Argument(help="Question, or with --raw text to continue.")],
    strategies: Annotated[
        str,
        typer.Option(
            help="Comma-separated, as amusd,speculative:3.", show_default="all of the server"
        ),
    ] = "",
    max_tokens: MaxTokens = 128,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each strategy, interleaved.")] = 3,
    raw: Raw = False,
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
    """Decode PROMPT with every strategy and compare speed and output.

    Exit code 1 if the outputs differ.
    """
    if not prompt:
        raise InvalidInputError("the prompt is empty: write at least one character")
    prompts = [Prompt(text=prompt) if raw else Prompt.chat(prompt)] * repeat
    choices = parse_strategies(strategies) if strategies else []
    chosen = ServerChoice(address, use_proxy, tls, ca, api_key, draft, verify, lookup, timeout)
    with chosen.client() as client:
        runners = [choice.runner(client) for choice in choices or _all_strategies(client)]
        with progress_bar() as progress:
            task = progress.add_task("decoding", total=len(runners) * repeat)
            measurements = measure(runners, prompts, max_tokens, lambda: progress.advance(task))
    show(measurements, f"{repeat} runs of up to {max_tokens} tokens")
    reference = reference_of(measurements)
    if not all(one.same_outputs(reference) for one in measurements):
        errors.print("the outputs differ", style="red")
        raise typer.Exit(1)


def _all_strategies(client: Client) -> list[StrategyChoice]:
    known = client.server_info().strategies
    found = [codec.strategy_from_proto(one, Strategy.AMUSD) for one in known]
    return [StrategyChoice(strategy.value, strategy) for strategy in found]
