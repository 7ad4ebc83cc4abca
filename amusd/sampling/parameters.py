"""How a token is chosen from logits, as values that both models of a session share.

Rules of this file
- Values are complete: a default is filled in where a value is made.
- A value that exists is valid; ``SamplingParameters`` refuses the others and names the field.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from amusd.protocol.errors import InvalidInputError

MAX_LOGPROBS = 20
"""Most likeliest tokens beside a chosen one."""
MAX_BIASES = 1024
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_TOKENS = 64
MAX_NGRAM_SIZE = 64
MAX_CONSTRAINT_BYTES = 256 * 1024


class ConstraintKind(StrEnum):
    """The language that a constraint is written in."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    CHOICES = "choices"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class Constraint:
    """The form that an output must have.

    ``text`` is the schema, the expression or the grammar; ``choices`` the texts to choose from.
    """

    kind: ConstraintKind
    text: str = ""
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what is empty or too long; whether a text is well-formed, a compiler decides."""
        size = len(self.text.encode()) + sum(len(one.encode()) for one in self.choices)
        if size > MAX_CONSTRAINT_BYTES:
            raise InvalidInputError(
                f"the constraint has {size} bytes: send at most {MAX_CONSTRAINT_BYTES}"
            )
        if self.kind is ConstraintKind.CHOICES:
            if not self.choices or not all(self.choices):
                raise InvalidInputError("choices need at least one text, and none may be empty")
        elif self.kind is not ConstraintKind.JSON_OBJECT and not self.text:
            raise InvalidInputError(f"the constraint's {self.kind.value} is empty")


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How a token is chosen; see ``protos/amusd/v1/sampling.proto`` for each field.

    Raises:
        InvalidInputError: a value is out of range or no number; the message names its field.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    seed: int = 0
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.temperature:
            _check("temperature", self.temperature, 0.01, 100.0, "0 or ")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidInputError(f"top_p is {self.top_p:g}: use a number above 0, at most 1")
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if not 0 <= self.no_repeat_ngram_size <= MAX_NGRAM_SIZE:
            raise InvalidInputError(
                f"no_repeat_ngram_size is {self.no_repeat_ngram_size}: use 1 to {MAX_NGRAM_SIZE}, "
                "or 0 for none"
            )
        for token, bias in self.logit_bias:
            _check(f"logit_bias of token {token}", bias, -100.0, 100.0)
        if len(self.logit_bias) > MAX_BIASES:
            raise InvalidInputError(f"logit_bias has more than {MAX_BIASES} tokens")
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise InvalidInputError(f"bad_words has more than {MAX_BAD_WORDS} sequences")
        if not all(1 <= len(word) <= MAX_BAD_WORD_TOKENS for word in self.bad_words):
            raise InvalidInputError(
                f"bad_words needs sequences of 1 to {MAX_BAD_WORD_TOKENS} tokens"
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the largest processed logit wins, without noise."""
        return self.temperature == 0.0

    @property
    def has_filters(self) -> bool:
        """Whether top-k, top-p or min-p leave tokens out."""
        return bool(self.top_k) or self.top_p < 1.0 or self.min_p > 0.0


def _check(name: str, value: float, least: float, most: float, besides: str = "") -> None:
    # A value that came as a float32 is a little off: that of 0.01 is below it.
    if not (math.isfinite(value) and least - 1e-7 * max(0.0, least) <= value <= most):
        raise InvalidInputError(f"{name} is {value:g}: use {besides}{least:g} to {most:g}")


@dataclass(frozen=True, slots=True)
class LogprobsOptions:
    """Which log-probabilities a session returns, with ``num_top`` likeliest tokens each."""

    num_top: int = 0
    is_processed: bool = False
    has_prompt: bool = False

    def __post_init__(self) -> None:
        """Refuse more likeliest tokens than are returned."""
        if not 0 <= self.num_top <= MAX_LOGPROBS:
            raise InvalidInputError(f"num_top is {self.num_top}: use 0 to {MAX_LOGPROBS}")


@dataclass(frozen=True, slots=True)
class SequenceSampling:
    """What an engine needs to choose the tokens of one sequence.

    ``num_prompt_tokens`` are not counted by presence and frequency penalties; a constraint begins
    behind them. Before ``min_position`` the tokens of ``banned_token_ids`` are banned.
    ``logprobs`` of None: none are computed.
    """

    parameters: SamplingParameters = SamplingParameters()
    num_prompt_tokens: int = 0
    min_position: int = 0
    banned_token_ids: tuple[int, ...] = ()
    logprobs: LogprobsOptions | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the largest logit of the model wins as it is."""
        greedy = SamplingParameters(seed=self.parameters.seed)
        return self.parameters == greedy and not self.min_position

    def check_vocabulary(self, size: int) -> None:
        """Refuse token ids outside a vocabulary of ``size`` tokens; 0: the vocabulary is unknown.

        Raises:
            InvalidInputError: a token id is not below ``size``; the message names its field.
        """
        if not size:
            return
        parameters = self.parameters
        fields = {
            "logit_bias": [token for token, _ in parameters.logit_bias],
            "allowed_token_ids": parameters.allowed_token_ids,
            "bad_words": [token for word in parameters.bad_words for token in word],
            "banned_token_ids": self.banned_token_ids,
        }
        for name, tokens in fields.items():
            if tokens and max(tokens) >= size:
                raise InvalidInputError(
                    f"{name}: token id {max(tokens)} is outside the vocabulary of {size} tokens"
                )


GREEDY = SequenceSampling()
"""The largest logit wins."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: of the token there, and of the likeliest ones.

    ``top`` has tokens and their log-probabilities, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
