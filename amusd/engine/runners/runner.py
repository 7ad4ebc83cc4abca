"""The interface of a model runner, and the batch it takes.

An engine keeps track of sequences. A ``ModelRunner`` owns the model and the tensors of the KV
cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from amusd.engine.sampling.reference_sampler import RowSampling, Sampled
from amusd.engine.sampling.sampler import Ranking

Buffer = TypeVar("Buffer")
"""Keys and values of one sequence, in the form that a runner needs."""


class RunnerRefusedError(Exception):
    """A runner cannot run a model. The message says why, in one line."""


@dataclass(frozen=True, slots=True)
class Chunk(Generic[Buffer]):
    """The tokens of one sequence in a batch, at positions ``[start, start + len(tokens))``.

    The buffer holds the keys and values of positions ``[0, start)``. Later ones were rolled back
    and are overwritten. The runner returns an output for each of the last ``num_outputs`` tokens.
    ``rows`` say how each output is sampled; empty: the largest logit wins.
    """

    buffer: Buffer
    start: int
    tokens: Sequence[int]
    num_outputs: int
    rows: Sequence[RowSampling] = ()

    def part(self, first: int, last: int) -> "Chunk[Buffer]":
        """Return the chunk of ``tokens[first:last]``, with the outputs of these tokens."""
        num_before = len(self.tokens) - self.num_outputs
        first_output = max(first, num_before)
        num_outputs = max(0, last - first_output)
        rows = self.rows[first_output - num_before :][:num_outputs]
        return Chunk(self.buffer, self.start + first, self.tokens[first:last], num_outputs, rows)


def rows_of(batch: Sequence[Chunk[Buffer]]) -> list[RowSampling | None]:
    """Return how each output of a batch is sampled, in order; None: the largest logit wins."""
    rows: list[RowSampling | None] = []
    for chunk in batch:
        rows += chunk.rows or [None] * chunk.num_outputs
    return rows


class ModelRunner(Protocol[Buffer]):
    """Runs batches of one model. A batch has at most one chunk of each sequence."""

    @property
    def name(self) -> str:
        """What logs and ``GetServerInfo`` call this kind of runner."""

    def allocate(self, capacity: int) -> Buffer:
        """Return a buffer for the keys and values of ``capacity`` tokens."""

    def copy(self, donor: Buffer, target: Buffer, length: int) -> None:
        """Copy the keys and values of the first ``length`` tokens to another buffer."""

    def free(self, buffer: Buffer) -> None:
        """Take back a buffer that is no longer used."""

    def logits(self, batch: Sequence[Chunk[Buffer]]) -> Tensor:
        """Run the batch and return the logits of its outputs in order, ``[outputs, head]``."""

    def tokens(self, batch: Sequence[Chunk[Buffer]]) -> list[int]:
        """Run the batch; return the token with the largest logit of each output, in order."""

    def rankings(self, batch: Sequence[Chunk[Buffer]]) -> list[Ranking]:
        """Run the batch; return the sampled and the next-best tokens of its outputs in order.

        The sampler says how many next-best ones, 1 or more.
        """

    def sample(self, batch: Sequence[Chunk[Buffer]]) -> list[Sampled]:
        """Run the batch; sample each output as the ``rows`` of its chunk say, in order."""
