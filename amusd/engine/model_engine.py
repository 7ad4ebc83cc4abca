"""The engine of every real model: it keeps the books of its slots.

How passes are run is chosen for each model and device, see ``choice``.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from amusd.engine.interface import DEFAULT_OPTIONS, EngineOptions, ScheduledSequence
from amusd.engine.kv.cache_manager import KVCacheManager
from amusd.engine.loading.model_source import LoadedModel, ModelSource, load_source
from amusd.engine.runners.runner import Chunk
from amusd.engine.runners.selection import RunnerSelection, select_runner
from amusd.fleet.model_description import CacheUsage, ModelDescription


class ModelEngine:
    """Greedy passes of a model over slots of its own."""

    def __init__(self, description: ModelDescription, choice: RunnerSelection) -> None:
        """Run a model as chosen for it; ``serve`` and ``load_engine`` choose."""
        self.description = description
        self._passes = choice.passes
        self.weight_format = choice.weight_format
        self.weight_bytes = choice.weight_bytes  # read by a pass
        self.max_batch = choice.max_batch
        self._slots = KVCacheManager(
            choice.max_tokens,
            choice.context_length,
            allocate=choice.passes.make,
            copy=choice.passes.copy if choice.reuses else None,
            free=choice.passes.drop,
            unit=choice.unit,
        )

    @property
    def num_open(self) -> int:
        """Number of open slots."""
        return len(self._slots)

    @property
    def usage(self) -> CacheUsage:
        """How much memory for keys and values is in use."""
        return self._slots.usage

    @torch.inference_mode()
    def open(self, capacity: int) -> int:
        """Return a new empty slot for at most ``capacity`` tokens."""
        return self._slots.open(capacity)

    def length(self, slot: int) -> int:
        """Return how many tokens the slot holds."""
        return self._slots.length(slot)

    @torch.inference_mode()
    def reuse(self, slot: int, tokens: Sequence[int]) -> int:
        """Take over what another slot holds of the beginning of ``tokens``, but the last one."""
        return self._slots.reuse(slot, tokens)

    @torch.inference_mode()
    def run(self, feeds: Sequence[ScheduledSequence]) -> list[list[int]]:
        """Run the feeds through the model; return the greedy tokens of each."""
        tokens = iter(self._passes.tokens(self._pieces(feeds)))
        return [list(itertools.islice(tokens, feed.num_outputs)) for feed in feeds]

    @torch.inference_mode()
    def logits(self, feeds: Sequence[ScheduledSequence]) -> Tensor:
        """Run the feeds as ``run`` does; return the logits of all outputs, [outputs, head]."""
        return self._passes.logits(self._pieces(feeds))

    def truncate(self, slot: int, length: int) -> None:
        """Forget what the slot holds beyond ``length`` tokens."""
        self._slots.truncate(slot, length)

    def close(self, slot: int) -> None:
        """Free the slot's keys and values."""
        self._slots.close(slot)

    def _pieces(self, feeds: Sequence[ScheduledSequence]) -> list[Chunk[object]]:
        """Note the feeds' tokens; return them with the buffers that they go to."""
        pieces: list[Chunk[object]] = []
        for feed in feeds:
            start = self._slots.length(feed.slot)
            self._slots.extend(feed.slot, feed.tokens, feed.is_prompt)
            pieces.append(Chunk(self._slots[feed.slot], start, feed.tokens, feed.num_outputs))
        return pieces


def serve(loaded: LoadedModel, options: EngineOptions = DEFAULT_OPTIONS) -> ModelEngine:
    """Return an engine for a loaded model, warmed up.

    Raises:
        InvalidInputError: the model cannot be rolled back, or not be run as the options ask.
    """
    choice = select_runner(loaded, options)
    description = replace(
        loaded.description,
        numerics=options.numerics.value,
        weight_format=choice.weight_format,
    )
    return ModelEngine(description, choice)


def load_engine(
    source: ModelSource,
    known_tokens_only: bool = False,
    options: EngineOptions = DEFAULT_OPTIONS,
) -> ModelEngine:
    """Load a model and return an engine for it; see ``load_source`` and ``serve``."""
    return serve(load_source(source, known_tokens_only), options)
