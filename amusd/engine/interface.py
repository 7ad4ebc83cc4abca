"""The interface of an engine. Tensors stay below it; callers exchange lists of ints."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeAlias

from amusd.fleet.model_description import CacheUsage, ModelDescription
from amusd.protocol.errors import AmusdError, InvalidInputError
from amusd.sampling.parameters import GREEDY, SequenceSampling, TokenLogprobs
from amusd.settings import check_bounds, setting

NO_TOKEN = -1
"""Stands for a token where the logits are not finite, so that there is no largest one."""

NOTHING_ALLOWED = -2
"""Stands for a token where a request's own bans leave none."""

MAX_ALTERNATIVES = 4
"""Most next-best tokens that an engine of a real model gives beside an output."""


class Numerics(StrEnum):
    """How far a token's result may depend on the rest of its batch."""

    FAST = "fast"
    """Batches of different shapes may round differently. A near tie may give another token."""
    EXACT = "exact"
    """The same bits for every strategy, chunking of the prompt, and composition of the batch."""


class WeightFormat(StrEnum):
    """How an engine stores weights in memory."""

    COMPACT = "compact"
    """The smallest lossless format, where the engine supports it; the results stay the same."""
    PLAIN = "plain"
    """The dtype that the model computes in."""
    INT8 = "int8"
    """8 bits a weight and a scale for every 32 weights: faster, but the output changes."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine runs its model, apart from the device.

    ``max_context`` is the most tokens of one session; 0: the model's context. ``index_bytes`` is
    what the service itself keeps of each cached token; the size of the KV cache includes it.
    ``num_alternatives`` is how many next-best tokens the engine gives beside an output, at most
    ``MAX_ALTERNATIVES``; 0: none, at no cost. A synthetic model's name sets its own. ``is_draft``:
    the tokens are proposals only, so where a request allows none, the engine gives any.
    """

    max_batch: int = setting(
        32,
        "Maximum number of sessions in a batch. A synthetic model's name sets its own.",
        unit="sessions",
        at_least=1,
    )
    cache_mib: int = setting(
        0, "Size of the KV cache in MiB; 0: half of the free memory.", unit="MiB", at_least=0
    )
    reuse_prefixes: bool = setting(
        True, "Prefix caching: compute a prefix that prompts share, such as a system prompt, once."
    )
    numerics: Numerics = setting(
        Numerics.FAST,
        "Numerics: exact makes the logits of a token independent of its batch, bit for bit, so "
        "that even near ties are stable; fast allows them to differ by rounding.",
    )
    weights: WeightFormat = setting(
        WeightFormat.COMPACT,
        "Weight format: compact is smaller where that is lossless, plain is the dtype of the "
        "model, int8 is faster but lossy. On a verify model, int8 changes the output.",
    )

    max_context: int = 0
    index_bytes: int = 0
    num_alternatives: int = 0
    is_draft: bool = False

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_bounds(self)
        if not 0 <= self.num_alternatives <= MAX_ALTERNATIVES:
            raise InvalidInputError(
                f"num_alternatives is {self.num_alternatives}: use 0 to {MAX_ALTERNATIVES}"
            )


DEFAULT_OPTIONS = EngineOptions()


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """The tokens of one sequence in the next batch. They follow the tokens in its KV cache.

    The engine returns the next token after each of the last ``num_outputs`` of ``tokens``.
    ``targets`` are the tokens whose log-probabilities are asked for, one for each output;
    ``NO_TOKEN`` stands for the output itself. Empty: for each the output itself.
    """

    slot: int
    tokens: Sequence[int]
    num_outputs: int
    is_prompt: bool = False
    """Whether the tokens are prefill of a prompt. They count for the hit rate of the cache."""
    targets: Sequence[int] = ()


Outcome: TypeAlias = "list[int] | AmusdError"
"""What a batch gives one of its sequences: its sampled tokens, or the error that ends its session.

An error concerns this sequence alone, such as a request that allows no token.
"""


class Engine(Protocol):
    """A causal language model with a KV cache for several sequences.

    A slot is the handle of an open sequence. Sequences are independent: the tokens of one never
    change the results of another. An engine belongs to one thread.
    """

    @property
    def description(self) -> ModelDescription:
        """The model that this engine runs."""

    @property
    def max_batch(self) -> int:
        """Most sequences in a batch, 1 or more."""

    @property
    def num_alternatives(self) -> int:
        """Most next-best tokens that it gives beside an output; 0: none."""

    @property
    def num_open(self) -> int:
        """Number of open sequences."""

    @property
    def usage(self) -> CacheUsage:
        """How much memory for keys and values is in use."""

    def prepare(self, sampling: SequenceSampling) -> object:
        """Do the slow part of opening a sequence: compile its constraint. It takes up to seconds.

        Any thread may call it. ``open`` is quick as long as the caller keeps what it returns.

        Raises:
            InvalidInputError: the constraint cannot be used.
            NotServedError: the model takes no constraint.
        """

    def open(self, capacity: int, sampling: SequenceSampling = GREEDY) -> int:
        """Return the slot of a new empty sequence for at most ``capacity`` tokens.

        ``sampling`` says how its tokens are chosen, as long as it is open.

        Raises:
            CacheFullError: the memory that is left is too small now.
            InvalidInputError: the capacity exceeds the context length, or the whole memory; or the
                engine cannot sample like this.
        """

    def length(self, slot: int) -> int:
        """Return how many tokens of the sequence are in the KV cache."""

    def reuse(self, slot: int, tokens: Sequence[int]) -> int:
        """Reuse the longest cached prefix of ``tokens``, leaving at least one token to compute.

        The sequence's own tokens must be a prefix of ``tokens``. Returns the number of cached
        tokens that the sequence gains.
        """

    def run(self, batch: Sequence[ScheduledSequence]) -> Sequence[Outcome]:
        """Run one batch; return the sampled tokens of each sequence, ``num_outputs`` each.

        Fewer are returned, at least one, before a position where its sampling allows no token. If
        it allows none at the first position behind the prompt that has an output, the outcome is
        an ``InvalidInputError``.

        A batch has each sequence at most once. ``NO_TOKEN`` stands where the model computed NaN or
        infinity; other sequences are not affected. After any exception the caller truncates each
        sequence to its length before the batch. Then it can run the batch again, or parts of it.

        Raises:
            LimitExceededError: tokens exceed the capacity of their sequence.
        """

    def alternatives(self, slot: int) -> Sequence[int]:
        """Return the next-best tokens beside the last output of a sequence, the best first.

        At most ``num_alternatives``. Beside ``NO_TOKEN`` there are none.
        """

    def probabilities(self, slot: int) -> Sequence[float]:
        """Return the model's probabilities of the last output and of its alternatives, in order.

        Empty if the engine does not know them, or the sequence has had no output. An engine that
        gives alternatives knows them.
        """

    def logprobs(self, slot: int) -> Sequence[TokenLogprobs]:
        """Return the log-probabilities of a sequence's outputs in its last batch, in order.

        They are those of the outputs, or of the sequence's ``targets``. Empty unless its sampling
        asks for them.
        """

    def truncate(self, slot: int, length: int) -> None:
        """Drop the sequence's tokens from position ``length`` on, in constant time."""

    def close(self, slot: int) -> None:
        """Close the sequence and free its memory."""
