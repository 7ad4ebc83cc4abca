"""A service's description of its model, its KV cache and its limits."""

from collections.abc import Sequence
from dataclasses import dataclass

from amusd.fleet.vocabulary import Vocabulary, explain_difference
from amusd.protocol.errors import InvalidInputError

PROMPT_LOOKUP = "prompt-lookup"
"""Name of the drafter that uses n-gram lookup alone and needs no model."""

BYTES_TOKENIZER = "bytes"
"""Name of the tokenizer whose tokens 0 to 255 are the bytes of UTF-8."""

SYNTHETIC = "synthetic"
"""Name of a model without weights; ``synthetic:SETTINGS`` sets its properties."""


def is_synthetic(model: str) -> bool:
    """Return whether ``model`` names a model without weights."""
    return model == SYNTHETIC or model.startswith(f"{SYNTHETIC}:")


def wants_lookup(draft: str, requested: bool | None) -> bool:
    """Return whether the draft service uses n-gram lookup beside the draft model ``draft``.

    ``requested`` None is the default: lookup beside every real model. A synthetic model gets none,
    because lookup would change the agreement that the model is set to.

    Raises:
        InvalidInputError: lookup is requested, but no draft model is named.
    """
    has_model = draft not in ("", PROMPT_LOOKUP)
    if requested and not has_model:
        raise InvalidInputError(
            f"--lookup needs a draft model, not {draft or 'none'!r}: name one, or use "
            f"{PROMPT_LOOKUP} without --lookup for n-gram lookup alone"
        )
    is_real = has_model and not is_synthetic(draft)
    return is_real if requested is None else requested


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model as its service runs it. ``context_length`` and ``output_size`` count tokens.

    ``numerics`` and ``weight_format`` have the values of the engine's options of that name, and
    are empty if unknown. ``weights_fingerprint`` does not depend on the name of the model.
    ``runner`` names the model runner, and ``runner_reason`` says why no faster one runs it; both
    are empty without a model.
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
        """Raise InvalidInputError if a token id is outside the vocabulary."""
        if self.output_size and tokens and max(tokens) >= self.output_size:
            raise InvalidInputError(
                f"token id {max(tokens)} is outside the vocabulary of {self.output_size} tokens"
            )

    def summary(self) -> str:
        """Return a description of one line, for logs."""
        size = f"{self.num_parameters / 1e6:.0f} M parameters, " if self.num_parameters else ""
        return f"{self.name} ({size}{self.dtype} on {self.device})"


@dataclass(frozen=True, slots=True)
class CacheUsage:
    """Use of the KV cache, in tokens.

    ``max_tokens`` is its capacity. ``num_reserved`` tokens belong to open sessions, and
    ``num_retained`` are kept of closed sessions for prefix reuse. Of all prompt tokens since the
    start, ``num_computed`` went through the model and ``num_cached`` came from the cache.
    """

    max_tokens: int
    num_reserved: int = 0
    num_retained: int = 0
    num_computed: int = 0
    num_cached: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that came from the cache, 0 to 1."""
        return self.num_cached / max(1, self.num_cached + self.num_computed)


def check_pair(draft: ModelDescription, verify: ModelDescription) -> None:
    """Raise InvalidInputError if the vocabularies of the two models differ."""
    difference = explain_difference(draft.vocabulary, verify.vocabulary)
    if difference is not None:
        raise InvalidInputError(
            f"draft {draft.name!r} and verify {verify.name!r} cannot work together: {difference}; "
            "pair models that share their tokenizer"
        )


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """Upper limits of a service; ``max_context`` and ``max_lookahead`` count tokens."""

    max_sessions: int
    max_context: int
    max_lookahead: int
    max_waiting: int = 0
    max_branches: int = 0
