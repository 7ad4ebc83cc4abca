"""What one pass of a model takes and gives, and the ways of running it that stand behind an engine.

An engine keeps track of sequences; a ``ModelRunner`` owns the model and the cache tensors.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

Buffer = TypeVar("Buffer")


@dataclass(frozen=True, slots=True)
class Chunk(Generic[Buffer]):
    """New tokens of one session, behind the ``start`` tokens that its buffer holds.

    What the buffer holds from ``start`` on was rolled back, and is overwritten. Wanted are the
    model's answers after the last ``num_outputs`` tokens.
    """

    buffer: Buffer
    start: int
    tokens: Sequence[int]
    num_outputs: int

    def part(self, first: int, last: int) -> "Chunk[Buffer]":
        """Return the tokens from ``first`` up to ``last`` as a piece, with their outputs."""
        first_output = max(first, len(self.tokens) - self.num_outputs)
        tokens = self.tokens[first:last]
        return Chunk(self.buffer, self.start + first, tokens, max(0, last - first_output))


class ModelRunner(Protocol[Buffer]):
    """Runs passes of one model over pieces of different sessions."""

    def make(self, capacity: int) -> Buffer:
        """Return a buffer for the keys and values of ``capacity`` tokens."""

    def copy(self, donor: Buffer, target: Buffer, length: int) -> None:
        """Copy the first ``length`` tokens' keys and values from one buffer to another."""

    def drop(self, buffer: Buffer) -> None:
        """Take a buffer back."""

    def logits(self, pieces: Sequence[Chunk[Buffer]]) -> Tensor:
        """Run the pieces; return the logits of all their outputs in order, [outputs, head]."""

    def tokens(self, pieces: Sequence[Chunk[Buffer]]) -> list[int]:
        """Run the pieces; return the greedy tokens of all their outputs in order."""


@dataclass(frozen=True, slots=True)
class PassLimits:
    """How much one pass takes."""

    tokens: int
    tokens_of_a_piece: int
    pieces: int


def run_in_passes(
    pieces: Sequence[Chunk[Buffer]],
    limits: PassLimits,
    run: Callable[[list[Chunk[Buffer]]], Tensor],
) -> Tensor:
    """Run pieces in as many passes as they need; return their outputs in order, [outputs, ...].

    ``run`` runs one pass and returns its outputs, [outputs, ...].
    """
    found: list[list[Tensor]] = [[] for _ in pieces]
    for batch in _rounds(pieces, limits):
        outputs = run([part for _, part in batch])
        start = 0
        for index, part in batch:
            found[index].append(outputs[start : start + part.num_outputs])
            start += part.num_outputs
    return torch.cat([part for parts in found for part in parts])


def _rounds(
    pieces: Sequence[Chunk[Buffer]], limits: PassLimits
) -> Iterator[list[tuple[int, Chunk[Buffer]]]]:
    """Take the next part of each unfinished piece in turn, as far as a pass has room."""
    done = [0] * len(pieces)
    while True:
        batch: list[tuple[int, Chunk[Buffer]]] = []
        left = limits.tokens
        for index, piece in enumerate(pieces):
            size = min(left, limits.tokens_of_a_piece, len(piece.tokens) - done[index])
            if size > 0 and len(batch) < limits.pieces:
                batch.append((index, piece.part(done[index], done[index] + size)))
                done[index] += size
                left -= size
        if not batch:
            return
        yield batch


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let the model attend in the way registered as ``name`` for now.

    Only for now, because others may hold the model too and call it in the usual way.
    """
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


def no_mask(*args: object, **kwargs: object) -> None:
    """Mask function for ways of attention that make their own."""


def refuse_variants(arguments: Mapping[str, object]) -> None:
    """Raise NotImplementedError if a layer asks for more than plain attention."""
    for name in ("softcap", "s_aux", "sliding_window", "position_bias"):
        if arguments.get(name) is not None:
            raise NotImplementedError(f"its attention has a {name}")
