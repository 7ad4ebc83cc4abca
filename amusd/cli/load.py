"""Measures a server under load: several requests at once, or requests that arrive at a rate.

Each strategy gets all prompts at the same arrival times, and the strategies take turns by rounds.
"""

import itertools
import random
import statistics as stats
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from amusd.analysis.generation_statistics import Statistics
from amusd.cli.measure import WARM_UP_TOKENS, StrategyChoice
from amusd.client import Client, Options
from amusd.prompts import Prompt
from amusd.protocol.errors import AmusdError

PERCENTILES = (50, 90, 95, 99)
_SEED = 20_261_127  # of the arrival times


@dataclass(frozen=True, slots=True)
class Load:
    """At most ``concurrency`` requests at once.

    They arrive at ``request_rate`` per second, by a Poisson process; 0: one begins as soon as
    another one ends.
    """

    concurrency: int = 1
    request_rate: float = 0.0

    @property
    def is_one_by_one(self) -> bool:
        """Whether a request begins when the one before has ended."""
        return self.concurrency == 1 and not self.request_rate

    def __str__(self) -> str:
        rate = f", {self.request_rate:g} requests a second" if self.request_rate else ""
        return f"{self.concurrency} at once{rate}"

    def arrivals(self, num_requests: int) -> list[float]:
        """Return the arrival times of requests, in seconds from the start."""
        if not self.request_rate:
            return [0.0] * num_requests
        chance = random.Random(_SEED)
        gaps = (chance.expovariate(self.request_rate) for _ in range(num_requests))
        return list(itertools.accumulate(gaps))


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """A request: seconds from its arrival to each chunk, and what came."""

    chunk_seconds: tuple[float, ...]
    tokens: tuple[int, ...] = ()
    statistics: Statistics | None = None
    failure: str = ""

    @property
    def gaps(self) -> list[float]:
        """The times between two chunks, in seconds."""
        return [later - one for one, later in itertools.pairwise(self.chunk_seconds)]

    @property
    def seconds_per_token(self) -> float:
        """Its time, from its arrival on, for each token."""
        return self.chunk_seconds[-1] / max(1, len(self.tokens))


@dataclass(slots=True)
class LoadMeasurement:
    """All requests of one strategy."""

    name: str
    requests: list[RequestTimes] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def done(self) -> list[RequestTimes]:
        """The requests that succeeded."""
        return [one for one in self.requests if not one.failure]

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of all requests for each second."""
        return sum(len(one.tokens) for one in self.done) / self.seconds

    def report(self, reference: "LoadMeasurement") -> dict[str, Any]:
        """Return the figures for a file, relative to ``reference``."""
        done = self.done
        figures: dict[str, Any] = {
            "strategy": self.name,
            "requests": len(self.requests),
            "failures": [one.failure for one in self.requests if one.failure],
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "requests_per_second": len(done) / self.seconds,
            "speedup": self.tokens_per_second / reference.tokens_per_second,
            "outputs_identical": self.same_outputs(reference),
        }
        if done:
            figures |= {
                "time_to_first_token_ms": percentiles([one.chunk_seconds[0] for one in done]),
                "inter_chunk_ms": percentiles([gap for one in done for gap in one.gaps]),
                "ms_per_token": percentiles([one.seconds_per_token for one in done]),
                "request_ms": percentiles([one.chunk_seconds[-1] for one in done]),
                "tokens_per_pass": self._tokens_per_pass(),
            }
        return figures

    def same_outputs(self, other: "LoadMeasurement") -> bool:
        """Whether every request that succeeded in both has the same tokens."""
        pairs = zip(self.requests, other.requests, strict=True)
        return all(one.tokens == two.tokens for one, two in pairs if not one.failure + two.failure)

    def _tokens_per_pass(self) -> float:
        found = [one.statistics for one in self.done if one.statistics]
        return sum(one.num_output_tokens for one in found) / sum(one.num_passes for one in found)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return percentiles of times, in milliseconds; empty for no times."""
    if not seconds:
        return {}
    cuts = stats.quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else []
    return {f"p{one}": 1e3 * (cuts[one - 1] if cuts else seconds[0]) for one in PERCENTILES}


def measure_load(
    client: Client,
    choices: Sequence[StrategyChoice],
    prompts: Sequence[Prompt],
    max_tokens: int,
    load: Load,
    rounds: int,
    on_request: Callable[[], None] = lambda: None,
) -> list[LoadMeasurement]:
    """Send every prompt ``rounds`` times with each strategy, the strategies in turn."""
    found = [LoadMeasurement(choice.name) for choice in choices]
    for choice in choices:
        _request(client, choice, prompts[0], min(WARM_UP_TOKENS, max_tokens), time.perf_counter())
    for number in range(rounds):
        for index in range(len(choices)):
            turn = (index + number) % len(choices)
            started = time.perf_counter()
            found[turn].requests += _round(
                client, choices[turn], prompts, max_tokens, load, on_request
            )
            found[turn].seconds += time.perf_counter() - started
    return found


def _round(
    client: Client,
    choice: StrategyChoice,
    prompts: Sequence[Prompt],
    max_tokens: int,
    load: Load,
    on_request: Callable[[], None],
) -> Iterator[RequestTimes]:
    """Yield the requests of one round, in the order of the prompts, when all have ended."""
    started = time.perf_counter()
    is_over = threading.Event()

    def one(prompt: Prompt, arrival: float) -> RequestTimes:
        # A request that finds no free place waits from its arrival on.
        arrived = started + arrival if load.request_rate else time.perf_counter()
        if is_over.is_set():
            return RequestTimes((), failure="interrupted")
        found = _request(client, choice, prompt, max_tokens, arrived)
        on_request()
        return found

    with ThreadPoolExecutor(load.concurrency) as pool:
        futures: list[Future[RequestTimes]] = []
        try:
            for prompt, arrival in zip(prompts, load.arrivals(len(prompts)), strict=True):
                time.sleep(max(0.0, started + arrival - time.perf_counter()))
                futures.append(pool.submit(one, prompt, arrival))
            found = [future.result() for future in futures]
        finally:
            is_over.set()
    yield from found


def _request(
    client: Client, choice: StrategyChoice, prompt: Prompt, max_tokens: int, arrived: float
) -> RequestTimes:
    options = Options(choice.strategy, max_tokens, choice.lookahead)
    times: list[float] = []
    generation = client.generate(prompt, options)
    try:
        for piece in generation:
            if piece.tokens:
                times.append(time.perf_counter() - arrived)
    except AmusdError as error:
        return RequestTimes(tuple(times), failure=str(error))
    return RequestTimes(tuple(times), tuple(generation.tokens), generation.statistics)
