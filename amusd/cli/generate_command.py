"""``amusd generate``: streams the answer to one prompt."""

import dataclasses
import enum
import json
import sys
from dataclasses import dataclass
from typing import Any

import click

from amusd.analysis.generation_statistics import Statistics
from amusd.cli.declared_options import settings_command
from amusd.cli.request_settings import RequestSettings
from amusd.cli.server_choice import ServerChoice, errors
from amusd.cli.tables import shares
from amusd.client import Completion, Generation, PositionLogprobs, TokenLogprob
from amusd.clients.chat_messages import user_message
from amusd.protocol.errors import InvalidInputError
from amusd.sampling.parameters import MAX_LOGPROBS
from amusd.settings import part, setting

_STDIN = "-"
_LEAST_LOGPROB = -9999.0  # as in the gateway's answers
_MAX_STDIN_BYTES = 4 * 1024 * 1024  # a request holds no more


@dataclass(frozen=True, slots=True)
class GenerateSettings:
    """What ``amusd generate`` asks for beside the prompt, and how it prints the answer."""

    raw: bool = setting(
        False,
        "Continue the prompt as plain text, without the chat template of the model.",
        variable="",
    )
    system: str = setting("", "System message of the conversation.", variable="", unit="text")
    json: bool = setting(
        False, "Print a JSON object at the end: text, tokens, finish reason, seed, statistics.",
        variable="",
    )  # fmt: skip
    n: int = setting(
        1, "Number of completions; printed at the end if there are several.",
        variable="", at_least=1, at_most=16, unit="number",
    )  # fmt: skip
    logprobs: int | None = setting(
        None, "Log-probabilities of each token and of this many likeliest ones; with --json.",
        variable="", default_text="none", at_least=0, at_most=MAX_LOGPROBS, unit="number",
    )  # fmt: skip
    request: RequestSettings = part(RequestSettings())
    server: ServerChoice = part(ServerChoice())


def _generate(settings: GenerateSettings, prompt: str | None) -> None:
    text = _prompt(prompt, settings.raw)
    if settings.raw and settings.system:
        raise InvalidInputError("a raw prompt has no system message: use --raw or --system")
    if settings.logprobs is not None and not settings.json:
        raise InvalidInputError("--logprobs is printed with --json only: add --json")
    options = dataclasses.replace(
        settings.request.options(), n=settings.n, logprobs=settings.logprobs
    )
    with settings.server.client() as client:
        if settings.raw:
            generation = client.generate(text, options)
        else:
            generation = client.chat(_messages(settings.system, text), options)
        _print(generation, settings)


def _prompt(argument: str | None, is_raw: bool) -> str:
    """Return the prompt: the argument, or standard input."""
    if argument is None and is_terminal():
        raise click.UsageError("Missing argument 'PROMPT'")
    if argument in (None, _STDIN):
        prompt = _standard_input()
        # The line break that ends a file is no part of a question.
        return _not_empty(prompt if is_raw else prompt.removesuffix("\n"))
    assert argument is not None
    return _not_empty(argument)


def is_terminal() -> bool:
    """Whether standard input is a person, or nothing at all."""
    return sys.stdin is None or sys.stdin.isatty()


def _standard_input() -> str:
    if sys.stdin is None:
        return ""
    content = sys.stdin.buffer.read(_MAX_STDIN_BYTES + 1)
    if len(content) > _MAX_STDIN_BYTES:
        raise InvalidInputError("standard input has more than 4 MiB: send a shorter prompt")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidInputError("standard input is not UTF-8: convert it") from None


def _not_empty(prompt: str) -> str:
    if not prompt:
        raise InvalidInputError("the prompt is empty: write at least one character")
    return prompt


def _messages(system: str, text: str) -> list[dict[str, Any]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, user_message(text)]


def _print(generation: Generation, settings: GenerateSettings) -> None:
    """Read an answer to its end and print it: as it comes, or at once in other forms."""
    if settings.json:
        for completion in generation.wait().completions:
            report = _report(completion)
            if settings.logprobs is not None:
                report["logprobs"] = [_position(one) for one in completion.logprobs]
            print(json.dumps(report, ensure_ascii=False))
        return
    if settings.n > 1:
        for completion in generation.wait().completions:
            print(f"[{completion.index + 1}] {completion.text}")
    else:
        for piece in generation:
            print(piece, end="", flush=True)
        print()
    errors.print(
        statistics_line(generation.summary(), generation.seed), style="dim", highlight=False
    )


def _report(completion: Completion) -> dict[str, Any]:
    """Return what ``--json`` prints of a completion."""
    reason, strategy = completion.finish_reason, completion.strategy
    return {
        "index": completion.index,
        "text": completion.text,
        "tokens": completion.tokens,
        "finish_reason": reason.value if reason is not None else None,
        "stop_text": completion.stop_text or None,
        "seed": completion.seed,
        "strategy": strategy.value if strategy is not None else None,
        "statistics": _figures(completion.statistics),
    }


def _position(found: PositionLogprobs) -> dict[str, Any]:
    return {**_token(found.chosen), "top": [_token(one) for one in found.top]}


def _token(found: TokenLogprob) -> dict[str, Any]:
    # JSON has no infinity.
    logprob = max(found.logprob, _LEAST_LOGPROB)
    return {"token": found.token, "text": found.text, "logprob": logprob}


def _figures(statistics: Statistics | None) -> dict[str, Any] | None:
    if statistics is None:
        return None
    rates = {
        "tokens_per_pass": statistics.tokens_per_pass,
        "acceptance_rate": statistics.acceptance_rate,
    }
    return dataclasses.asdict(statistics, dict_factory=_plain) | rates


def _plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value.value if isinstance(value, enum.Enum) else value for name, value in pairs}


def statistics_line(statistics: Statistics, seed: int | None) -> str:
    """Return the statistics of a generation as one line, with the seed if it was sampled."""
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
    if seed:
        line += f", seed {seed}"
    if statistics.fallback_reason:
        line += f"; decoded without a draft: {statistics.fallback_reason}"
    return line


_HELP = """Stream the model's answer to PROMPT.

PROMPT is a question, or with --raw a text to continue. Without it, or if it is -, it is read from
standard input."""

generate = settings_command(
    "generate",
    _HELP,
    GenerateSettings(),
    _generate,
    arguments=[click.Argument(["prompt"], required=False)],
)
