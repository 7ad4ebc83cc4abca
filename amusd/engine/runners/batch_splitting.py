"""Splits a batch into as many forward passes as a runner's limits need."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amusd.engine.runners.runner import Buffer, Chunk


@dataclass(frozen=True, slots=True)
class PassLimits:
    """How much one forward pass takes: tokens in all, tokens of a chunk, and chunks."""

    tokens: int
    chunk_tokens: int
    chunks: int


def run_split(
    batch: Sequence[Chunk[Buffer]],
    limits: PassLimits,
    run: Callable[[list[Chunk[Buffer]]], Tensor],
) -> Tensor:
    """Run a batch in parts that keep the limits; return its outputs in order, [outputs, ...].

    ``run`` runs one forward pass and returns its outputs, [outputs, ...].
    """
    found: list[list[Tensor]] = [[] for _ in batch]
    for parts in _split(batch, limits):
        outputs = run([part for _, part in parts])
        start = 0
        for index, part in parts:
            found[index].append(outputs[start : start + part.num_outputs])
            start += part.num_outputs
    return torch.cat([part for parts in found for part in parts])


def _split(
    batch: Sequence[Chunk[Buffer]], limits: PassLimits
) -> Iterator[list[tuple[int, Chunk[Buffer]]]]:
    """Yield forward passes: the next part of each unfinished chunk and its index, while it fits."""
    done = [0] * len(batch)
    while True:
        parts: list[tuple[int, Chunk[Buffer]]] = []
        left = limits.tokens
        for index, chunk in enumerate(batch):
            size = min(left, limits.chunk_tokens, len(chunk.tokens) - done[index])
            if size > 0 and len(parts) < limits.chunks:
                parts.append((index, chunk.part(done[index], done[index] + size)))
                done[index] += size
                left -= size
        if not parts:
            return
        yield parts
