"""Timing of several candidates interleaved, so that other load on the machine affects all of them.

The clock and the warm-up calls are those of ``torch.utils.benchmark``. pytest-benchmark and pyperf
time one candidate to the end before the next, so they cannot interleave.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.benchmark import Timer

Name = TypeVar("Name")


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of each round, in their order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper quartile."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def scaled(self, factor: float) -> "Times":
        """Return all times multiplied by ``factor``, for instance per token or per byte."""
        return Times(tuple(factor * seconds for seconds in self.seconds))

    def report(self) -> dict[str, Any]:
        """Return the figures for a file, in ms."""
        low, high = self.quartiles
        return {"ms": 1e3 * self.median, "quartiles_ms": [1e3 * low, 1e3 * high]}


def time_interleaved(
    candidates: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, Times]:
    """Call each candidate once a round; each call has warm-up calls before it."""
    timers = {
        name: Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        for name, run in candidates.items()
    }
    found: dict[str, list[float]] = {name: [] for name in timers}
    for number in range(rounds):
        for name in rotated(list(timers), number):
            found[name].append(timers[name].timeit(1).median)
    return {name: Times(tuple(seconds)) for name, seconds in found.items()}


def ratio(slow: Times, fast: Times) -> tuple[float, float, float]:
    """Return how many times faster ``fast`` is, round by round: median and quartiles."""
    ratios = Times(tuple(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)))
    return ratios.median, *ratios.quartiles


def rotated(names: list[Name], by: int) -> list[Name]:
    """Return ``names`` rotated, so that each is first in some round."""
    first = by % len(names)
    return names[first:] + names[:first]
