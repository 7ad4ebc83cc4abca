"""Measures decoding strategies side by side: the same prompts, interleaved, in one run."""

import statistics as stats
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from amusd.analysis.generation_statistics import SourceAcceptance, Statistics
from amusd.client import Client, Options
from amusd.prompts import Prompt
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.strategy import Strategy

WARM_UP_TOKENS = 8
SMALLEST_GAIN = 1.02
"""A smaller ratio of speeds is noise, and no verdict names it."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One output of one runner; a baseline has no statistics."""

    tokens: tuple[int, ...]
    seconds: float
    statistics: Statistics | None = None

    @property
    def ms_per_token(self) -> float:
        """Time per output token, including the time of the prompt."""
        return 1e3 * self.seconds / max(1, len(self.tokens))


class Runner(Protocol):
    """Something that decodes prompts and can be measured."""

    @property
    def name(self) -> str:
        """Its name in tables and files."""

    def run(self, prompt: Prompt, max_tokens: int) -> Sample:
        """Decode one prompt."""


@dataclass(frozen=True, slots=True)
class ServiceRunner:
    """Decodes through the services, with one strategy."""

    client: Client
    name: str
    strategy: Strategy
    lookahead: int | None = None
    ignore_eos: bool = False

    def run(self, prompt: Prompt, max_tokens: int) -> Sample:
        """Decode one prompt."""
        options = Options(self.strategy, max_tokens, self.lookahead, ignore_eos=self.ignore_eos)
        started = time.perf_counter()
        generation = self.client.generate(prompt, options).wait()
        seconds = time.perf_counter() - started
        return Sample(tuple(generation.tokens), seconds, generation.summary())


@dataclass(frozen=True, slots=True)
class StrategyChoice:
    """A requested strategy; a lookahead of None is the server's default."""

    name: str
    strategy: Strategy
    lookahead: int | None = None

    def runner(self, client: Client) -> ServiceRunner:
        """Return a runner that decodes with it through ``client``."""
        return ServiceRunner(client, self.name, self.strategy, self.lookahead)


def parse_strategies(text: str) -> list[StrategyChoice]:
    """Parse a list such as ``autoregressive,speculative:3,amusd``; a number is the lookahead.

    Raises:
        InvalidInputError: a strategy is unknown, or a lookahead is not a number of 1 or more.
    """
    choices = []
    for name in filter(None, (part.strip().lower() for part in text.split(","))):
        word, colon, number = name.partition(":")
        try:
            strategy = Strategy(word)
        except ValueError:
            known = ", ".join(one.value for one in Strategy)
            raise InvalidInputError(f"unknown strategy {word!r}: use {known}") from None
        if colon and (not number.isdecimal() or int(number) < 1):
            raise InvalidInputError(
                f"lookahead {number!r} of {name!r} is not a number of 1 or more"
            )
        choices.append(StrategyChoice(name, strategy, int(number) if colon else None))
    if not choices:
        raise InvalidInputError("no strategy is given: name at least one")
    return choices


class Named(Protocol):
    """A measurement of a strategy or baseline."""

    @property
    def name(self) -> str:
        """The name of the strategy or baseline."""


NamedT = TypeVar("NamedT", bound=Named)


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the three quartiles of values, one or more."""
    if len(values) < 2:
        return [*values] * 3
    return stats.quantiles(values, n=4, method="inclusive")


@dataclass(slots=True)
class Measurement:
    """All samples of one runner, in the order of the prompts."""

    runner: Runner
    samples: list[Sample] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of its runner."""
        return self.runner.name

    @property
    def tokens(self) -> int:
        """Number of output tokens."""
        return sum(len(sample.tokens) for sample in self.samples)

    @property
    def ms_per_token(self) -> float:
        """Total time divided by the total number of tokens."""
        return 1e3 * sum(sample.seconds for sample in self.samples) / max(1, self.tokens)

    def quartiles(self) -> list[float]:
        """Return the quartiles of the prompts' ms per token."""
        return quartiles([sample.ms_per_token for sample in self.samples])

    def same_outputs(self, other: "Measurement") -> bool:
        """Whether every prompt has the same tokens in both."""
        return [one.tokens for one in self.samples] == [one.tokens for one in other.samples]

    def _total(self, name: str) -> Any:
        return sum(getattr(one.statistics, name) for one in self.samples if one.statistics)

    def report(self, reference: "Measurement") -> dict[str, Any]:
        """Return the figures for a file; speed-up and identity are relative to ``reference``."""
        passes = self._total("num_passes")
        compared = self._total("num_accepted") + self._total("num_rejected")
        seconds = sum(sample.seconds for sample in self.samples)
        figures: dict[str, Any] = {
            "strategy": self.runner.name,
            "tokens": self.tokens,
            "ms_per_token": self.ms_per_token,
            "ms_per_token_quartiles": self.quartiles(),
            "speedup": reference.ms_per_token / self.ms_per_token,
            "acceptance_rate": self._total("num_accepted") / compared if compared else 0.0,
            "tokens_per_pass": self.tokens / passes if passes else 1.0,
            "rollbacks": self._total("num_rollbacks"),
            "outputs_identical": self.same_outputs(reference),
        }
        if passes:
            served = [sample.statistics for sample in self.samples if sample.statistics]
            first = [one.time_to_first_token_seconds for one in served]
            figures |= {
                "passes": passes,
                "drafted": self._total("num_drafted"),
                "accepted": self._total("num_accepted"),
                "rejected": self._total("num_rejected"),
                "wasted": self._total("num_wasted"),
                "time_to_first_token_ms": 1e3 * stats.median(first),
                "draft_busy": self._total("draft_busy_seconds") / seconds,
                "verify_busy": self._total("verify_busy_seconds") / seconds,
                "acceptance_per_position": self._acceptance_per_position(),
                "acceptance_per_source": {
                    one.source.value: {
                        "drafted": one.num_drafted,
                        "checked": one.num_checked,
                        "accepted": one.num_accepted,
                    }
                    for one in self.acceptance_per_source()
                },
                "fallbacks": sum(
                    bool(s.statistics and s.statistics.fallback_reason) for s in self.samples
                ),
            }
        return figures

    def acceptance_per_source(self) -> tuple[SourceAcceptance, ...]:
        """Return the acceptance of each draft source over all samples."""
        found = [
            one
            for sample in self.samples
            if sample.statistics
            for one in sample.statistics.acceptance_per_source
        ]
        return tuple(
            SourceAcceptance(
                source,
                sum(one.num_drafted for one in found if one.source is source),
                sum(one.num_checked for one in found if one.source is source),
                sum(one.num_accepted for one in found if one.source is source),
            )
            for source in DraftSource
            if any(one.source is source for one in found)
        )

    def _acceptance_per_position(self) -> list[dict[str, int]]:
        positions: list[dict[str, int]] = []
        for sample in self.samples:
            found = sample.statistics.acceptance_per_position if sample.statistics else ()
            for index, position in enumerate(found):
                if index == len(positions):
                    positions.append({"checked": 0, "accepted": 0})
                positions[index]["checked"] += position.num_checked
                positions[index]["accepted"] += position.num_accepted
        return positions


def measure(
    runners: Sequence[Runner],
    prompts: Sequence[Prompt],
    max_tokens: int,
    on_sample: Callable[[], None] = lambda: None,
) -> list[Measurement]:
    """Run every prompt with every runner, interleaved, after a short warm-up of each runner."""
    for runner in runners:
        runner.run(prompts[0], min(WARM_UP_TOKENS, max_tokens))
    measurements = [Measurement(runner) for runner in runners]
    for index, prompt in enumerate(prompts):
        for measurement in _rotated(measurements, index):
            measurement.samples.append(measurement.runner.run(prompt, max_tokens))
            on_sample()
    return measurements


def reference_of(measurements: Sequence[NamedT]) -> NamedT:
    """Return the measurement of autoregressive decoding if there is one, else the first."""
    plain = (one for one in measurements if one.name == Strategy.AUTOREGRESSIVE.value)
    return next(plain, measurements[0])


def _rotated(measurements: list[Measurement], by: int) -> Iterator[Measurement]:
    """Yield the measurements rotated, so that each is first equally often."""
    for index in range(len(measurements)):
        yield measurements[(index + by) % len(measurements)]
