"""The tables that go through the real services, on this machine's cores or GPUs."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from amusd.cli.local import LocalSettings, local_services
from amusd.cli.measure import ServiceRunner, measure, parse_strategies, reference_of
from amusd.client import Client
from amusd.core.strategy import Strategy
from amusd.engine.interface import EngineOptions
from amusd.prompts import Prompt
from benchmarks.engine_tables import TableOfFigures
from benchmarks.rounds import Times, ratio, rotated

STRATEGIES = "autoregressive,speculative:5,amusd"
_FRESH = EngineOptions(reuse_prefixes=False)  # each way of decoding reads its prompts anew


def settings_of(draft: str, verify: str) -> LocalSettings:
    """Return services whose ways of decoding compare."""
    return LocalSettings(draft=draft, verify=verify, draft_options=_FRESH, verify_options=_FRESH)


def strategies(
    settings: LocalSettings, prompts: Sequence[Prompt], max_tokens: int
) -> TableOfFigures:
    """All strategies on the same prompts, in turns."""
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


def clients(
    settings: LocalSettings, prompts: Sequence[Prompt], max_tokens: int, rounds: int
) -> TableOfFigures:
    """Clients at once, each with a prompt of its own: tokens a second against one client."""
    table = TableOfFigures(
        "Clients at once through the services",
        ("", "clients", "tokens/s", "quartiles", "against 1"),
    )
    with local_services(settings) as services, Client(services.address) as client:
        for strategy in (Strategy.AUTOREGRESSIVE, Strategy.AMUSD):
            runner = ServiceRunner(client, strategy.value, strategy, ignore_eos=True)
            times = _in_turns(runner, prompts, max_tokens, rounds)
            for count, found in times.items():
                gain = ratio(times[1], found)
                rate = 1 / found.median
                low, high = found.quartiles
                table.rows.append(
                    (
                        strategy.value,
                        str(count),
                        f"{rate:.0f}",
                        f"{1 / high:.0f} to {1 / low:.0f}",
                        f"{gain[0]:.2f}x",
                    )
                )
                table.figures[f"{strategy.value}, {count} clients"] = _figures(found, gain)
    return table


def _in_turns(
    runner: ServiceRunner, prompts: Sequence[Prompt], max_tokens: int, rounds: int
) -> dict[int, Times]:
    """Return the seconds a token of one client and of as many as there are prompts."""
    found: dict[int, list[float]] = {1: [], len(prompts): []}
    runner.run(prompts[0], max_tokens)
    for number in range(rounds):
        for count in rotated(list(found), number):
            started = time.perf_counter()
            with ThreadPoolExecutor(count) as pool:
                samples = pool.map(lambda one: runner.run(one, max_tokens), prompts[:count])
                num_tokens = sum(len(sample.tokens) for sample in samples)
            found[count].append((time.perf_counter() - started) / num_tokens)
    return {count: Times(tuple(seconds)) for count, seconds in found.items()}


def _figures(found: Times, gain: tuple[float, float, float]) -> dict[str, Any]:
    low, high = found.quartiles
    return {
        "tokens_per_second": 1 / found.median,
        "quartiles": [1 / high, 1 / low],
        "gain": gain,
    }
