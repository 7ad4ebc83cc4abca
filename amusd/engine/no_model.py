"""The engine of a draft service without a model: it has slots, and runs no batch."""

from collections.abc import Sequence

from amusd.engine.interface import ScheduledSequence
from amusd.fleet.model_description import PROMPT_LOOKUP, CacheUsage, ModelDescription
from amusd.fleet.vocabulary import Vocabulary

_CONTEXT_LENGTH = 1 << 20


class NoModel:
    """Takes sequences of any vocabulary; its KV cache has no size."""

    max_batch = 1
    usage = CacheUsage(max_tokens=0)

    def __init__(self) -> None:
        """Start without sequences."""
        self.num_open = 0
        self._last_slot = 0
        self.num_alternatives = 0
        self.description = ModelDescription(
            name=PROMPT_LOOKUP,
            device="cpu",
            dtype="none",
            num_parameters=0,
            context_length=_CONTEXT_LENGTH,
            output_size=0,
            vocabulary=Vocabulary(0),
        )

    def open(self, capacity: int) -> int:
        """Return a new slot; ``capacity`` has no meaning here."""
        self.num_open += 1
        self._last_slot += 1
        return self._last_slot

    def length(self, slot: int) -> int:
        """Return 0: no token is ever computed."""
        return 0

    def reuse(self, slot: int, tokens: Sequence[int]) -> int:
        """Return 0: there is nothing to reuse."""
        return 0

    def run(self, feeds: Sequence[ScheduledSequence]) -> list[list[int]]:
        """Refuse: there is no model."""
        raise NotImplementedError("a drafter without a model runs no batch")

    def alternatives(self, slot: int) -> Sequence[int]:
        """Return none: there is no model."""
        return ()

    def truncate(self, slot: int, length: int) -> None:
        """Nothing to forget."""

    def close(self, slot: int) -> None:
        """Free the slot."""
        self.num_open -= 1
