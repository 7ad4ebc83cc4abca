"""What every engine can do; tensors stay below this border, above it are lists of ints."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from amusd.core.model import ModelDescription


@dataclass(frozen=True, slots=True)
class Feed:
    """New tokens of one slot for the next pass, after the ``length`` tokens it holds.

    The engine answers with its token after each of the last ``num_outputs`` of ``tokens``.
    """

    slot: int
    tokens: Sequence[int]
    num_outputs: int


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

    def open(self, capacity: int) -> int:
        """Return a new empty slot for at most ``capacity`` tokens.

        Raises:
            LimitExceededError: the capacity is above the context length, or no memory is left.
        """

    def length(self, slot: int) -> int:
        """Return how many tokens the slot holds."""

    def run(self, feeds: Sequence[Feed]) -> list[list[int]]:
        """Run one pass and return the greedy tokens of each feed, ``num_outputs`` each."""

    def truncate(self, slot: int, length: int) -> None:
        """Forget what the slot holds beyond ``length`` tokens, in constant time."""

    def close(self, slot: int) -> None:
        """Free the slot."""
