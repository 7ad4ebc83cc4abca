"""Serves LongRoPE: the rotary factors of a whole text change when it passes a length.

Rules:

- A text of up to ``switch`` tokens has the short factors, a longer one the long factors. They
  apply to all of its tokens, so cached keys are wrong as soon as the text is on the other side.
- Then all of the text is computed again in one pass. Transformers' ``generate`` does the same.
- A model chooses the factors by the largest position of a pass. So texts of both kinds never
  share a pass, and a pass of long texts has whole chunks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic

import torch
from torch import Tensor

from amusd.engine.runners.runner import Buffer, Chunk, ModelRunner, rows_of
from amusd.engine.sampling.reference_sampler import Sampled
from amusd.engine.sampling.sampler import GREEDY, Ranking, Sampler


class Factors(Enum):
    """The rotary factors of a text, in the order in which a batch is run."""

    SHORT = 0
    LONG = 1


@dataclass(slots=True)
class SwitchingBuffer(Generic[Buffer]):
    """A buffer, the tokens of its sequence, and the factors of their keys.

    ``factors`` None: the content of the buffer is not valid.
    """

    held: Buffer
    tokens: list[int] = field(default_factory=list)
    factors: Factors | None = None


class RopeSwitchingRunner(Generic[Buffer]):
    """Runs each batch in up to two passes of another runner: short texts, then long texts."""

    def __init__(self, runner: ModelRunner[Buffer], switch: int, sampler: Sampler = GREEDY) -> None:
        """Run on ``runner``, which must run a batch in one pass, or each chunk in its own.

        Texts of more than ``switch`` tokens have the long factors.
        """
        self._runner = runner
        self._switch = switch
        self._sampler = sampler

    @property
    def name(self) -> str:
        """The name of the other runner."""
        return self._runner.name

    def allocate(self, capacity: int) -> SwitchingBuffer[Buffer]:
        """Return an empty buffer."""
        return SwitchingBuffer(self._runner.allocate(capacity))

    def copy(
        self, donor: SwitchingBuffer[Buffer], target: SwitchingBuffer[Buffer], length: int
    ) -> None:
        """Copy the first ``length`` tokens, with the factors that they have."""
        self._runner.copy(donor.held, target.held, length)
        target.tokens, target.factors = donor.tokens[:length], donor.factors

    def free(self, buffer: SwitchingBuffer[Buffer]) -> None:
        """Free the buffer of the other runner."""
        self._runner.free(buffer.held)

    @torch.inference_mode()
    def logits(self, batch: Sequence[Chunk[SwitchingBuffer[Buffer]]]) -> Tensor:
        """Return the logits of all outputs, [outputs, head]."""
        for chunk in batch:
            del chunk.buffer.tokens[chunk.start :]
            chunk.buffer.tokens += chunk.tokens
        rows: list[list[Tensor]] = [[] for _ in batch]
        for factors in Factors:
            parts = [
                (index, part)
                for index, chunk in enumerate(batch)
                if (part := self._part(chunk, factors)) is not None
            ]
            if parts:
                for (index, _), own in zip(parts, self._run(parts, batch, factors), strict=True):
                    rows[index].append(own)
        return torch.cat([row for own in rows for row in own])

    @torch.inference_mode()
    def tokens(self, batch: Sequence[Chunk[SwitchingBuffer[Buffer]]]) -> list[int]:
        """Return the sampled tokens of all outputs."""
        tokens: list[int] = self._sampler.sample(self.logits(batch)).tolist()
        return tokens

    @torch.inference_mode()
    def rankings(self, batch: Sequence[Chunk[SwitchingBuffer[Buffer]]]) -> list[Ranking]:
        """Return the sampled and the next-best tokens of all outputs."""
        return self._sampler.rankings(self._sampler.rank(self.logits(batch)))

    @torch.inference_mode()
    def sample(self, batch: Sequence[Chunk[SwitchingBuffer[Buffer]]]) -> list[Sampled]:
        """Sample all outputs as the rows of their chunks say."""
        return self._sampler.sample_rows(self.logits(batch), rows_of(batch))

    def _run(
        self,
        parts: list[tuple[int, Chunk[Buffer]]],
        batch: Sequence[Chunk[SwitchingBuffer[Buffer]]],
        factors: Factors,
    ) -> Iterator[Tensor]:
        """Run one pass; yield the outputs of each part, [outputs, head]."""
        buffers = [batch[index].buffer for index, _ in parts]
        for buffer in buffers:
            buffer.factors = None  # a pass that fails leaves keys of unknown factors
        logits = self._runner.logits([part for _, part in parts])
        for buffer in buffers:
            buffer.factors = factors
        return iter(torch.split(logits, [part.num_outputs for _, part in parts]))

    def _part(
        self, chunk: Chunk[SwitchingBuffer[Buffer]], factors: Factors
    ) -> Chunk[Buffer] | None:
        """Return what to run of a chunk with these factors: positions [0 or start, end)."""
        start, end = chunk.start, chunk.start + len(chunk.tokens)
        first_output = end - chunk.num_outputs
        if factors is Factors.SHORT:
            if start >= self._switch or (end > self._switch and first_output >= self._switch):
                return None
            end = min(end, self._switch)
            num_outputs = max(0, end - first_output)
        else:
            if end <= self._switch:
                return None
            num_outputs = min(chunk.num_outputs, end - self._switch)
        buffer = chunk.buffer
        if buffer.factors is not factors:
            start = 0
        return Chunk(buffer.held, start, buffer.tokens[start:end], num_outputs)
