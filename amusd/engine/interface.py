"""What every engine can do; tensors stay below this border, above it are lists of ints."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from amusd.fleet.model_description import CacheUsage, ModelDescription
from amusd.settings import check_bounds, setting


class Numerics(StrEnum):
    """How far a token's result may depend on what else goes through the model beside it."""

    FAST = "fast"
    """Passes of different shapes may round differently, which can turn a near tie."""
    EXACT = "exact"
    """The same bits whatever the strategy, the cut of the prompt, and the other sessions."""


class WeightFormat(StrEnum):
    """How an engine keeps weights in memory."""

    COMPACT = "compact"
    """As small as possible without loss, where the engine can; the numbers stay the same."""
    PLAIN = "plain"
    """In the number format that the model computes in."""
    INT8 = "int8"
    """8 bits a weight with a scale for every 32: faster, and another model's output."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine runs its model, apart from the device."""

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

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_bounds(self)


DEFAULT_OPTIONS = EngineOptions()


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """New tokens of one slot for the next pass, after the ``length`` tokens it holds.

    The engine answers with its token after each of the last ``num_outputs`` of ``tokens``.
    """

    slot: int
    tokens: Sequence[int]
    num_outputs: int
    is_prompt: bool = False
    """Whether the tokens belong to a prompt that is being read, for the cache's hit rate."""


class Engine(Protocol):
    """A causal language model with a key/value cache in slots, one for each session.

    An engine belongs to one thread. Slots are independent: what happens to one never changes
    what another answers.
    """

    @property
    def description(self) -> ModelDescription:
        """The model that runs here."""

    @property
    def max_batch(self) -> int:
        """Most feeds that one pass takes, 1 or more."""

    @property
    def num_open(self) -> int:
        """Number of open slots."""

    @property
    def usage(self) -> CacheUsage:
        """How much memory for keys and values is in use."""

    def open(self, capacity: int) -> int:
        """Return a new empty slot for at most ``capacity`` tokens.

        Raises:
            CacheFullError: no memory is left for it now.
            LimitExceededError: the capacity is above the context length, or above all memory.
        """

    def length(self, slot: int) -> int:
        """Return how many tokens the slot holds."""

    def reuse(self, slot: int, tokens: Sequence[int]) -> int:
        """Take over what another slot holds of the beginning of ``tokens``, but the last one.

        What ``slot`` holds has to be the beginning of ``tokens``. Returns how many it holds more.
        """

    def run(self, feeds: Sequence[ScheduledSequence]) -> list[list[int]]:
        """Run one pass and return the greedy tokens of each feed, ``num_outputs`` each."""

    def truncate(self, slot: int, length: int) -> None:
        """Forget what the slot holds beyond ``length`` tokens, in constant time."""

    def close(self, slot: int) -> None:
        """Free the slot."""
