"""Outputs that should be the same compared: how many differ, where first, and how near the tie was.

Greedy outputs of one model can differ only where two tokens were nearly equally likely and a pass
of another shape rounded the other way; what follows such a place is another text.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Difference:
    """Where an output first differs: ``expected`` stood at ``place`` of the reference, from 0.

    ``gap`` is how much likelier the reference's token was there, in logits; None: not known. An end
    is a token of -1.
    """

    prompt: int
    place: int
    expected: int
    found: int
    gap: float | None = None


def first_difference(
    prompt: int, expected: Sequence[int], found: Sequence[int]
) -> Difference | None:
    """Return where an output first differs from the reference's, or None."""
    for place in range(max(len(expected), len(found))):
        wanted = expected[place] if place < len(expected) else -1
        token = found[place] if place < len(found) else -1
        if wanted != token:
            return Difference(prompt, place, wanted, token)
    return None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outputs of one way of decoding against the reference's."""

    numerics: str
    strategy: str
    batch_size: int
    num_outputs: int
    differences: tuple[Difference, ...]

    @property
    def places(self) -> tuple[int, float] | None:
        """The first and the median place of a first difference; None: all outputs are the same."""
        found = [difference.place for difference in self.differences]
        return (min(found), statistics.median(found)) if found else None

    @property
    def gaps(self) -> tuple[float, float] | None:
        """The smallest and the largest gap in logits; None: none is known."""
        found = [one.gap for one in self.differences if one.gap is not None]
        return (min(found), max(found)) if found else None
