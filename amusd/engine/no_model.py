"""The engine of a draft service without a model: it has slots, and runs no batch.

Its memory is that of the indices which the service keeps of its sessions' tokens.
"""

from collections.abc import Sequence

from amusd.engine.interface import DEFAULT_OPTIONS, EngineOptions, ScheduledSequence
from amusd.engine.kv.cache_manager import KVCacheManager
from amusd.engine.kv.free_memory import free_bytes
from amusd.fleet.model_description import PROMPT_LOOKUP, CacheUsage, ModelDescription
from amusd.fleet.vocabulary import Vocabulary
from amusd.sampling.parameters import GREEDY, SequenceSampling, TokenLogprobs

_CONTEXT_LENGTH = 1 << 20


class NoModel:
    """Takes sequences of any vocabulary, as long as there is memory for their indices."""

    max_batch = 1
    num_alternatives = 0

    def __init__(self, options: EngineOptions = DEFAULT_OPTIONS) -> None:
        """Start without sequences. A token takes ``options.index_bytes`` of the memory."""
        num_bytes = options.cache_mib << 20 or free_bytes("cpu") // 2
        max_tokens = num_bytes // max(1, options.index_bytes)
        self._slots: KVCacheManager[object] = KVCacheManager(
            max_tokens, _CONTEXT_LENGTH, allocate=lambda capacity: object()
        )
        self.description = ModelDescription(
            name=PROMPT_LOOKUP,
            device="cpu",
            dtype="none",
            num_parameters=0,
            context_length=_CONTEXT_LENGTH,
            output_size=0,
            vocabulary=Vocabulary(0),
        )

    @property
    def num_open(self) -> int:
        """Number of open sequences."""
        return len(self._slots)

    @property
    def usage(self) -> CacheUsage:
        """How much memory is in use, in tokens."""
        return self._slots.usage

    def prepare(self, sampling: SequenceSampling) -> object:
        """Do nothing: nothing is sampled."""

    def open(self, capacity: int, sampling: SequenceSampling = GREEDY) -> int:
        """Return a new slot, with memory for the index of ``capacity`` tokens.

        Any sampling is accepted: nothing is sampled.
        """
        return self._slots.open(capacity)

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

    def probabilities(self, slot: int) -> Sequence[float]:
        """Return none: there is no model."""
        return ()

    def logprobs(self, slot: int) -> Sequence[TokenLogprobs]:
        """Return none: there is no model."""
        return ()

    def truncate(self, slot: int, length: int) -> None:
        """Nothing to forget."""

    def close(self, slot: int) -> None:
        """Free the slot."""
        self._slots.close(slot)
