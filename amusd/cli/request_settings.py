"""The flags of a request, as ``amusd generate`` and ``amusd chat`` declare them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amusd.clients.request_options import Options
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.strategy import Strategy
from amusd.settings import setting

_SERVERS = "the server's"
_MAX_BIAS = 100


def _flag(help: str, default_text: str = "", **details: Any) -> Any:
    """Declare an option of a request that the server chooses if it is not set."""
    return setting(None, help, variable="", default_text=default_text or _SERVERS, **details)


def _repeated(help: str, unit: str) -> Any:
    """Declare an option that may be given several times."""
    return setting((), help, variable="", unit=unit, is_repeated=True, read=str, write=" ".join)


def _bias(text: str) -> tuple[int, float]:
    """Return the token id and the bias of a text such as ``42=-1.5``."""
    token, sign, bias = text.partition("=")
    try:
        found = int(token), float(bias)
    except ValueError:
        raise InvalidInputError(f"{text!r} is not a token id and a number, as 42=-1.5") from None
    if not (sign and 0 <= found[0] < 2**32 and abs(found[1]) <= _MAX_BIAS):  # false for NaN
        raise InvalidInputError(
            f"{text} is out of range, use an id from 0 and a bias from -{_MAX_BIAS} to {_MAX_BIAS}"
        )
    return found


def _written(biases: tuple[tuple[int, float], ...]) -> str:
    return " ".join(f"{token}={bias:g}" for token, bias in biases)


@dataclass(frozen=True, slots=True)
class RequestSettings:
    """Options of a request. A JSON schema and a grammar are names of files here."""

    strategy: Strategy | None = _flag("Decoding strategy.")
    max_tokens: int | None = _flag("Maximum output tokens.", at_least=1, unit="tokens")
    min_tokens: int = setting(0, "Minimum output tokens.", variable="", at_least=0, unit="tokens")
    lookahead: int | None = _flag("Speculation length.", at_least=1, unit="tokens")
    temperature: float | None = _flag(
        "Randomness; 0 takes the likeliest token.", "0", at_least=0, at_most=100, unit="number"
    )
    top_k: int | None = _flag(
        "Sample from this many likeliest tokens.", "all", at_least=0, unit="tokens"
    )
    top_p: float | None = _flag(
        "Sample from the likeliest tokens with this total probability.", "1",
        above=0, at_most=1, unit="number",
    )  # fmt: skip
    min_p: float | None = _flag(
        "Sample from tokens at least this likely, relative to the likeliest.", "0",
        at_least=0, at_most=1, unit="number",
    )  # fmt: skip
    seed: int | None = _flag(
        "Seed of the randomness: the same seed gives the same output.", "random",
        at_least=0, at_most=2**64 - 1, unit="number",
    )  # fmt: skip
    repetition_penalty: float | None = _flag(
        "Make tokens of prompt and output less likely, by division.", "1",
        at_least=0.01, at_most=100, unit="number",
    )  # fmt: skip
    presence_penalty: float | None = _flag(
        "Make tokens of the output less likely, once.", "0",
        at_least=-2, at_most=2, unit="number",
    )  # fmt: skip
    frequency_penalty: float | None = _flag(
        "Make tokens of the output less likely, each time.", "0",
        at_least=-2, at_most=2, unit="number",
    )  # fmt: skip
    no_repeat_ngram_size: int | None = _flag(
        "Never repeat a sequence of this many tokens.", "off", at_least=0, unit="tokens"
    )
    logit_bias: tuple[tuple[int, float], ...] = setting(
        (), "Number from -100 to 100 to add to the logit of a token id; given once for each.",
        variable="", unit="token=bias", is_repeated=True, read=_bias, write=_written,
    )  # fmt: skip
    stop: tuple[str, ...] = _repeated(
        "Text that ends the output; may be given several times.", "text"
    )
    include_stop: bool = setting(False, "Print the text that ends the output, too.", variable="")
    ignore_eos: bool = setting(False, "Continue after the model's end-of-text token.", variable="")
    json_schema: str = setting(
        "", "File with a JSON schema that the output is valid under.", variable="", unit="file"
    )
    json_object: bool = setting(False, "Make the output a JSON object.", variable="")
    regex: str = setting(
        "", "Regular expression that matches the whole output.", variable="", unit="regex"
    )
    choice: tuple[str, ...] = _repeated("Text that the output may be; given once for each.", "text")
    grammar: str = setting(
        "", "File with a grammar of the output, in the Lark syntax.", variable="", unit="file"
    )

    def options(self) -> Options:
        """Return the options of a request.

        Raises:
            InvalidInputError: a file cannot be read, or a token has two biases.
        """
        biases = dict(self.logit_bias)
        if len(biases) < len(self.logit_bias):
            raise InvalidInputError("a token has two biases: use --logit-bias once for each token")
        return Options(
            strategy=self.strategy,
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            lookahead=self.lookahead,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            logit_bias=biases,
            seed=self.seed,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            stop=self.stop,
            include_stop=self.include_stop,
            ignore_eos=self.ignore_eos,
            json_schema=_content(self.json_schema),
            json_object=self.json_object,
            regex=self.regex or None,
            choices=self.choice or None,
            grammar=_content(self.grammar),
        )


def _content(name: str) -> str | None:
    """Return the text of a file; None if the name is empty."""
    if not name:
        return None
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidInputError(f"{name} is not UTF-8: save it as UTF-8") from None
