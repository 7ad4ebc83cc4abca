"""The shapes of padded forward passes, and which shape fits a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

EXACT_QUERY_LENGTH = 8
"""Tokens of a row in an exact pass. A verify pass seldom has more. Padding is cheap on CUDA,
where a pass of a few hundred tokens takes about as long as reading the weights."""

MAX_PASS_TOKENS = 512
"""Tokens of a pass, padding included. A GPU computes longer than it reads beyond this."""

_MAX_QUERY_LENGTH = 64
_MIN_KV_LENGTH = 256
_KV_LENGTH_FACTOR = 4  # between lengths; each shape is one more graph to capture at start


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows of a pass, tokens of each row, and columns of the KV pool that attention reads."""

    batch: int
    query_length: int
    kv_length: int


@dataclass(frozen=True, slots=True)
class Buckets:
    """The values that each number of a shape may have, ascending. The last one is the largest."""

    batches: tuple[int, ...]
    query_lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...]

    @classmethod
    def fast(cls, num_rows: int, length: int) -> "Buckets":
        """Return few shapes of which one fits any batch without much padding."""
        return cls(
            _ascending(1, num_rows, 2),
            _ascending(1, _MAX_QUERY_LENGTH, 2),
            _ascending(_MIN_KV_LENGTH, length, _KV_LENGTH_FACTOR),
        )

    @classmethod
    def exact(cls, num_rows: int, length: int, query_length: int = EXACT_QUERY_LENGTH) -> "Buckets":
        """Return the one shape of exact passes."""
        return cls((num_rows,), (query_length,), (length,))

    def query_limit(self, batch: int) -> int:
        """Return the most tokens of a row in a pass of ``batch`` rows."""
        fitting = [length for length in self.query_lengths if batch * length <= MAX_PASS_TOKENS]
        return max(fitting, default=self.query_lengths[0])

    def fit(self, batch: int, query_length: int, kv_length: int) -> Shape:
        """Return the smallest shape that is large enough."""
        return Shape(
            _smallest(self.batches, batch),
            _smallest(self.query_lengths, query_length),
            _smallest(self.kv_lengths, kv_length),
        )

    def shapes(self) -> list[Shape]:
        """Return all shapes, the largest first, so that graphs share its memory."""
        return [
            Shape(batch, query_length, kv_length)
            for kv_length in reversed(self.kv_lengths)
            for batch in reversed(self.batches)
            for query_length in reversed(self.query_lengths)
            if query_length <= self.query_limit(batch)
        ]


def _smallest(values: Sequence[int], needed: int) -> int:
    """Return the first value that is enough. No batch needs more than the last one."""
    return next(value for value in values if value >= needed)


def _ascending(first: int, last: int, factor: int) -> tuple[int, ...]:
    """Return first, first * factor and so on below ``last``, then ``last``."""
    numbers: list[int] = []
    number = first
    while number < last:
        numbers.append(number)
        number *= factor
    return (*numbers, last)
