"""Any causal language model that Transformers loads, in slots.

The engine keeps the books of its slots; how passes are run is chosen for each model and device,
see ``choice``.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from amusd.core.model import CacheUsage, ModelDescription
from amusd.engine.choice import Choice, choose_passes
from amusd.engine.interface import DEFAULT_OPTIONS, EngineOptions, Feed
from amusd.engine.model_source import LoadedModel, ModelSource, load_source
from amusd.engine.passes import Piece
from amusd.engine.slot_memory import SlotMemory

__all__ = ["ModelSource", "TransformersEngine", "load_engine", "serve"]


class TransformersEngine:
    """Greedy passes of a Transformers model over slots of its own."""

    def __init__(self, loaded: LoadedModel, choice: Choice) -> None:
        """Run ``loaded`` as chosen for it; ``serve`` and ``load_engine`` choose."""
        self._loaded = loaded
        self._passes = choice.passes
        self.max_batch = choice.max_batch
        self._slots = SlotMemory(
            choice.max_tokens,
            choice.context_length,
            make=choice.passes.make,
            copy=choice.passes.copy if choice.reuses else None,
            drop=choice.passes.drop,
            unit=choice.unit,
        )

    @property
    def description(self) -> ModelDescription:
        """The model that runs here."""
        return self._loaded.description

    @property
    def model(self) -> PreTrainedModel:
        """The model itself, for what needs more than greedy tokens."""
        return self._loaded.model

    @property
    def head_ids(self) -> Tensor | None:
        """Token id of each row of a reduced head, ``[head_rows]``."""
        return self._loaded.head_ids

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
    def run(self, feeds: Sequence[Feed]) -> list[list[int]]:
        """Run the feeds through the model; return the greedy tokens of each."""
        tokens = iter(self._passes.tokens(self._pieces(feeds)))
        return [list(itertools.islice(tokens, feed.num_outputs)) for feed in feeds]

    @torch.inference_mode()
    def logits(self, feeds: Sequence[Feed]) -> Tensor:
        """Run the feeds as ``run`` does; return the logits of all outputs, [outputs, head]."""
        return self._passes.logits(self._pieces(feeds))

    def truncate(self, slot: int, length: int) -> None:
        """Forget what the slot holds beyond ``length`` tokens."""
        self._slots.truncate(slot, length)

    def close(self, slot: int) -> None:
        """Free the slot's keys and values."""
        self._slots.close(slot)

    def _pieces(self, feeds: Sequence[Feed]) -> list[Piece[object]]:
        """Note the feeds' tokens; return them with the buffers that they go to."""
        pieces: list[Piece[object]] = []
        for feed in feeds:
            start = self._slots.length(feed.slot)
            self._slots.extend(feed.slot, feed.tokens, feed.is_prompt)
            pieces.append(Piece(self._slots[feed.slot], start, feed.tokens, feed.num_outputs))
        return pieces


def serve(loaded: LoadedModel, options: EngineOptions = DEFAULT_OPTIONS) -> TransformersEngine:
    """Return an engine for a loaded model, warmed up.

    Raises:
        InvalidInputError: the model cannot be rolled back, or not be run as the options ask.
    """
    return TransformersEngine(loaded, choose_passes(loaded, options))


def load_engine(
    source: ModelSource,
    known_tokens_only: bool = False,
    options: EngineOptions = DEFAULT_OPTIONS,
) -> TransformersEngine:
    """Load a model and return an engine for it; see ``load_source`` and ``serve``."""
    return serve(load_source(source, known_tokens_only), options)
