"""Comparison of outputs that should be identical: how many differ, where, and how near the tie was.

Greedy outputs of one model differ only at near ties: two tokens have almost the same logit, and a
pass of another shape rounds them the other way. All tokens after the first difference may differ.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Output = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tie:
    """A near tie: ``gap`` is the reference token's logit minus the other token's logit.

    ``spacing`` is the distance from the larger logit to the next value of the served dtype. The
    dtype cannot represent a smaller gap.
    """

    gap: float
    spacing: float

    @property
    def num_spacings(self) -> float:
        """The absolute gap in units of the spacing."""
        return abs(self.gap) / self.spacing


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token that differs from the reference, at ``index`` of the output, from 0.

    ``expected`` is the reference's token, ``found`` the output's; -1 stands for the end. A ``tie``
    of None is unknown.
    """

    prompt: int
    index: int
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
    """Return the first difference of an output from the reference; None if they are the same."""
    for index in range(max(len(expected), len(found))):
        wanted = expected[index] if index < len(expected) else -1
        token = found[index] if index < len(found) else -1
        if wanted != token:
            return Difference(prompt, index, wanted, token)
    return None


def differences(reference: Sequence[Output], outputs: Sequence[Output]) -> Iterator[Difference]:
    """Yield the first difference of each output that differs.

    Output i answers prompt i modulo the number of prompts.
    """
    for number, found in enumerate(outputs):
        prompt = number % len(reference)
        difference = first_difference(prompt, reference[prompt], found)
        if difference is not None:
            yield difference


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outputs of one strategy and batch size, compared with the reference.

    ``num_fallbacks`` outputs were decoded without the draft and do not test the strategy.
    """

    numerics: str
    strategy: str
    batch_size: int
    num_outputs: int
    differences: tuple[Difference, ...]
    num_fallbacks: int = 0

    @property
    def indices(self) -> tuple[int, float] | None:
        """The lowest and the median index of a first difference; None if no output differs."""
        found = [difference.index for difference in self.differences]
        return (min(found), statistics.median(found)) if found else None

    @property
    def gaps(self) -> tuple[float, float] | None:
        """The smallest and the largest absolute gap in logits; None if no tie is known."""
        found = [abs(one.tie.gap) for one in self.differences if one.tie is not None]
        return (min(found), max(found)) if found else None

    @property
    def spacings(self) -> tuple[float, float] | None:
        """The smallest and the largest gap in units of the spacing; None if no tie is known."""
        found = [one.tie.num_spacings for one in self.differences if one.tie is not None]
        return (min(found), max(found)) if found else None

    def report(self) -> dict[str, Any]:
        """Return the figures for a file."""
        first, median = self.indices or (None, None)
        return {
            "numerics": self.numerics,
            "strategy": self.strategy,
            "batch_size": self.batch_size,
            "num_outputs": self.num_outputs,
            "num_differing": len(self.differences),
            "num_fallbacks": self.num_fallbacks,
            "first_index": first,
            "median_index": median,
            "gaps": self.gaps,
            "gaps_in_spacings": self.spacings,
            "differences": [one.report() for one in self.differences],
        }
