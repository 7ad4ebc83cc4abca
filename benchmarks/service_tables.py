"""The tables that go through the real services, on this machine's cores or GPUs."""

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from amusd.cli.local_services import LocalSettings, local_services
from amusd.cli.measure import Sample, ServiceRunner, measure, parse_strategies, reference_of
from amusd.client import Client
from amusd.engine.interface import EngineOptions
from amusd.prompts import Prompt
from amusd.protocol.strategy import Strategy
from benchmarks.engine_tables import TableOfFigures
from benchmarks.rounds import Times, ratio, rotated

STRATEGIES = "autoregressive,speculative:5,amusd"
_PLAIN = Strategy.AUTOREGRESSIVE
_NO_PREFIX_CACHE = EngineOptions(reuse_prefixes=False)  # so that each strategy computes its prompts


def settings_of(draft: str, verify: str) -> LocalSettings:
    """Return settings of services without prefix reuse, so that strategies are comparable."""
    return LocalSettings(
        draft=draft,
        verify=verify,
        draft_options=_NO_PREFIX_CACHE,
        verify_options=_NO_PREFIX_CACHE,
    )


def strategies(
    settings: LocalSettings, prompts: Sequence[Prompt], max_tokens: int
) -> TableOfFigures:
    """Measure all strategies on the same prompts, interleaved."""
    with local_services(settings) as services, Client(services.address) as client:
        runners = [choice.runner(client) for choice in parse_strategies(STRATEGIES)]
        found = measure(runners, prompts, max_tokens)
    reference = reference_of(found)
    table = TableOfFigures(
        f"Strategies through the services, {len(prompts)} prompts, {max_tokens} tokens",
        ("", "ms a token", "quartiles", "speed-up", "acceptance", "tokens a pass", "same tokens"),
    )
    for one in found:
        figures = one.report(reference)
        low, _, high = one.quartiles()
        table.rows.append(
            (
                one.runner.name,
                f"{one.ms_per_token:.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{figures['speedup']:.2f}x",
                f"{figures['acceptance_rate']:.0%}",
                f"{figures['tokens_per_pass']:.2f}",
                "yes" if figures["outputs_identical"] else "no",
            )
        )
        table.figures[one.runner.name] = figures
    return table


@dataclass(slots=True)
class _Load:
    """The figures of one number of concurrent clients, round by round."""

    seconds_a_token: list[float] = field(default_factory=list)
    verify_busy: list[float] = field(default_factory=list)
    draft_busy: list[float] = field(default_factory=list)

    def add(self, samples: Sequence[Sample], seconds: float) -> None:
        """Add a round that took ``seconds``."""
        served = [sample.statistics for sample in samples if sample.statistics]
        self.seconds_a_token.append(seconds / sum(len(sample.tokens) for sample in samples))
        self.verify_busy.append(sum(one.verify_busy_seconds for one in served) / seconds)
        self.draft_busy.append(sum(one.draft_busy_seconds for one in served) / seconds)

    @property
    def times(self) -> Times:
        """Seconds a token."""
        return Times(tuple(self.seconds_a_token))


def clients(
    settings: LocalSettings,
    prompts: Sequence[Prompt],
    max_tokens: int,
    rounds: int,
    counts: Sequence[int],
) -> TableOfFigures:
    """Compare AMUSD with plain decoding for each number of concurrent clients, interleaved."""
    table = TableOfFigures(
        f"{len(prompts)} prompts by concurrent clients through the services, {max_tokens} tokens",
        (
            "",
            "clients",
            "tokens/s",
            "quartiles",
            "against 1",
            "over plain",
            "quartiles",
            "verify busy",
            "draft busy",
        ),
    )
    with local_services(settings) as services, Client(services.address) as client:
        runners = [
            ServiceRunner(client, strategy.value, strategy, ignore_eos=True)
            for strategy in (_PLAIN, Strategy.AMUSD)
        ]
        loads = _interleaved(runners, prompts, max_tokens, rounds, counts)
    for (name, count), load in loads.items():
        gain = ratio(loads[name, counts[0]].times, load.times)
        over_plain = ratio(loads[_PLAIN.value, count].times, load.times)
        figures = _figures(load, gain, over_plain)
        table.rows.append((name, str(count), *_cells(figures)))
        table.figures[f"{name}, {count} clients"] = figures
    return table


def _interleaved(
    runners: Sequence[ServiceRunner],
    prompts: Sequence[Prompt],
    max_tokens: int,
    rounds: int,
    counts: Sequence[int],
) -> dict[tuple[str, int], _Load]:
    """Let each number of clients share the prompts, with one strategy after the other."""
    found = {(runner.name, count): _Load() for runner in runners for count in counts}
    for runner in runners:
        runner.run(prompts[0], max_tokens)
    for number in range(rounds):
        for count in rotated(list(counts), number):
            for runner in rotated(list(runners), number):
                load = found[runner.name, count]
                started = time.perf_counter()
                samples = _served(runner, prompts, max_tokens, count)
                load.add(samples, time.perf_counter() - started)
    return found


def _served(
    runner: ServiceRunner, prompts: Sequence[Prompt], max_tokens: int, num_clients: int
) -> list[Sample]:
    """Return the outputs of the prompts, which ``num_clients`` take one after the other."""
    with ThreadPoolExecutor(num_clients) as pool:
        return list(pool.map(lambda one: runner.run(one, max_tokens), prompts))


def _figures(
    load: _Load, gain: tuple[float, float, float], over_plain: tuple[float, float, float]
) -> dict[str, Any]:
    low, high = load.times.quartiles
    return {
        "tokens_per_second": 1 / load.times.median,
        "quartiles": [1 / high, 1 / low],
        "gain": gain,
        "over_plain": over_plain,
        "verify_busy": statistics.median(load.verify_busy),
        "draft_busy": statistics.median(load.draft_busy),
    }


def _cells(figures: dict[str, Any]) -> tuple[str, ...]:
    low, high = figures["quartiles"]
    return (
        f"{figures['tokens_per_second']:.0f}",
        f"{low:.0f} to {high:.0f}",
        f"{figures['gain'][0]:.2f}x",
        "{:.2f}x".format(figures["over_plain"][0]),
        "{1:.2f} to {2:.2f}".format(*figures["over_plain"]),
        f"{figures['verify_busy']:.0%}",
        f"{figures['draft_busy']:.0%}",
    )
