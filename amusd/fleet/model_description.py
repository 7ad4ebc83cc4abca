"""What a service says about its model and its limits."""

from collections.abc import Sequence
from dataclasses import dataclass

from amusd.fleet.vocabulary import Vocabulary, explain_difference
from amusd.protocol.errors import InvalidInputError

PROMPT_LOOKUP = "prompt-lookup"
"""Name of the drafter that needs no model."""

BYTES_TOKENIZER = "bytes"
"""Name of the tokenizer whose tokens 0 to 255 are the bytes of UTF-8."""


SYNTHETIC = "synthetic"
"""Name of a model without weights; a colon and its settings may follow."""


def is_synthetic(model: str) -> bool:
    """Whether a name is that of a model without weights."""
    return model == SYNTHETIC or model.startswith(f"{SYNTHETIC}:")


def wants_lookup(draft: str, asked: bool | None) -> bool:
    """Return whether to look tokens up beside the draft model ``draft``.

    ``asked`` None: beside every real model. Synthetic ones measure an agreement that is dialled in.

    Raises:
        InvalidInputError: it is asked for, but there is no model beside it.
    """
    has_model = draft not in ("", PROMPT_LOOKUP)
    if asked and not has_model:
        raise InvalidInputError(
            f"a look-up (--lookup) needs a draft model beside it, not {draft or 'none'!r}: name "
            f"one, or use {PROMPT_LOOKUP} without --lookup to propose by look-up alone"
        )
    is_real = has_model and not is_synthetic(draft)
    return is_real if asked is None else asked


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model as its service runs it. ``context_length`` and ``output_size`` count tokens.

    ``numerics`` and ``weight_format`` are named as in the engine's options; empty: not known.
    ``weights_fingerprint`` is the same for the same weights, whatever they are called. ``runner``
    names the model runner, and ``runner_reason`` says why no faster one; empty: there is no model.
    """

    name: str
    device: str
    dtype: str
    num_parameters: int
    context_length: int
    output_size: int
    vocabulary: Vocabulary
    eos_token_ids: tuple[int, ...] = ()
    tokenizer: str = ""
    numerics: str = ""
    weight_format: str = ""
    weights_fingerprint: str = ""
    runner: str = ""
    runner_reason: str = ""

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raise InvalidInputError if one of ``tokens`` is an id that the model does not know."""
        if self.output_size and tokens and max(tokens) >= self.output_size:
            raise InvalidInputError(
                f"token id {max(tokens)} is outside the vocabulary of {self.output_size} tokens"
            )

    def summary(self) -> str:
        """Return the model in one line for people."""
        size = f"{self.num_parameters / 1e6:.0f} M parameters, " if self.num_parameters else ""
        return f"{self.name} ({size}{self.dtype} on {self.device})"


@dataclass(frozen=True, slots=True)
class CacheUsage:
    """Memory for keys and values, in tokens: what fits, and what is in use.

    ``num_reserved`` are those of open sessions, ``num_retained`` those kept for reuse. Of the
    prompts' tokens so far ``num_computed`` went through the model and ``num_cached`` did not.
    """

    max_tokens: int
    num_reserved: int = 0
    num_retained: int = 0
    num_computed: int = 0
    num_cached: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that did not have to be computed, 0 to 1."""
        return self.num_cached / max(1, self.num_cached + self.num_computed)


def check_pair(draft: ModelDescription, verify: ModelDescription) -> None:
    """Raise InvalidInputError if the two models have different vocabularies."""
    difference = explain_difference(draft.vocabulary, verify.vocabulary)
    if difference is not None:
        raise InvalidInputError(
            f"draft {draft.name!r} and verify {verify.name!r} cannot work together: {difference}; "
            "pair models that share their tokenizer"
        )


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """What a service takes on at most; context and look-ahead in tokens."""

    max_sessions: int
    max_context: int
    max_lookahead: int
    max_waiting: int = 0
