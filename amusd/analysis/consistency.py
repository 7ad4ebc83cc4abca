"""Outputs that should be the same compared: how many differ, where first, and how near the tie was.

Greedy outputs of one model can differ only where two tokens were nearly equally likely and a pass
of another shape rounded the other way; what follows such a place is another text.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Output = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tie:
    """How near two tokens were: ``gap`` is how much likelier the reference's was, in logits.

    ``spacing`` is the distance from the larger of the two logits to its neighbour in the number
    format that was served: less than that cannot be told apart.
    """

    gap: float
    spacing: float

    @property
    def num_spacings(self) -> float:
        """The size of the gap in units of the logits' spacing."""
        return abs(self.gap) / self.spacing


@dataclass(frozen=True, slots=True)
class Difference:
    """Where an output first differs: ``expected`` stood at ``place`` of the reference, from 0.

    An end is a token of -1; a tie of None is not known.
    """

    prompt: int
    place: int
    expected: int
    found: int
    tie: Tie | None = None

    def report(self) -> dict[str, Any]:
        """Return the figures for a file."""
        figures = asdict(self)
        if self.tie is not None:
            figures["tie"]["num_spacings"] = self.tie.num_spacings
        return figures


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


def differences(reference: Sequence[Output], outputs: Sequence[Output]) -> Iterator[Difference]:
    """Yield where outputs differ; output i answers prompt i, from 0 again after the last one."""
    for index, found in enumerate(outputs):
        prompt = index % len(reference)
        difference = first_difference(prompt, reference[prompt], found)
        if difference is not None:
            yield difference


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outputs of one way of decoding against the reference's.

    ``num_fallbacks`` of them were written without the draft, so they say nothing about a strategy.
    """

    numerics: str
    strategy: str
    batch_size: int
    num_outputs: int
    differences: tuple[Difference, ...]
    num_fallbacks: int = 0

    @property
    def places(self) -> tuple[int, float] | None:
        """The first and the median place of a first difference; None: all outputs are the same."""
        found = [difference.place for difference in self.differences]
        return (min(found), statistics.median(found)) if found else None

    @property
    def gaps(self) -> tuple[float, float] | None:
        """The smallest and the largest gap in logits, without sign; None: none is known."""
        found = [abs(one.tie.gap) for one in self.differences if one.tie is not None]
        return (min(found), max(found)) if found else None

    @property
    def spacings(self) -> tuple[float, float] | None:
        """The smallest and the largest gap in units of the logits' spacing; None: none known."""
        found = [one.tie.num_spacings for one in self.differences if one.tie is not None]
        return (min(found), max(found)) if found else None

    def report(self) -> dict[str, Any]:
        """Return the figures for a file."""
        first, median = self.places or (None, None)
        return {
            "numerics": self.numerics,
            "strategy": self.strategy,
            "batch_size": self.batch_size,
            "num_outputs": self.num_outputs,
            "num_differing": len(self.differences),
            "num_fallbacks": self.num_fallbacks,
            "first_place": first,
            "median_place": median,
            "gaps": self.gaps,
            "gaps_in_spacings": self.spacings,
            "differences": [one.report() for one in self.differences],
        }
