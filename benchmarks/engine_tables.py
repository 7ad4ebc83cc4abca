"""The tables of one model on one CPU core, each against Transformers or against itself."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from amusd.engine.interface import Numerics, WeightFormat
from amusd.engine.slot_engine import SlotEngine
from benchmarks.engines import (
    Bench,
    engine_pass,
    engine_text,
    transformers_pass,
    transformers_text,
)
from benchmarks.rounds import Times, ratio, time_in_turns

SIZES = (1, 2, 4, 8, 16)
_PROMPT = range(10, 26)
_TEXT_TOKENS = 32
_PLAIN_READ_BYTES = 512 << 20


@dataclass(slots=True)
class TableOfFigures:
    """Rows for people, and figures for a file."""

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Contestants:
    """Transformers, and engines by the format of their weights."""

    model: PreTrainedModel
    engines: dict[str, SlotEngine]

    @classmethod
    def of(cls, bench: Bench) -> "Contestants":
        """Load all of them; formats that come out the same are named once."""
        engines: dict[str, SlotEngine] = {}
        for weights in (WeightFormat.COMPACT, WeightFormat.PLAIN):
            engine = bench.engine(weights)
            engines.setdefault(engine.weight_format, engine)
        return cls(bench.load().model, engines)


def one_token(them: Contestants, rounds: int) -> TableOfFigures:
    """Plain decoding against ``generate``: ms a token of a text of 32 behind a short prompt."""
    prompt = [token % them.model.config.vocab_size for token in _PROMPT]
    runs: dict[str, Callable[[], list[int]]] = {
        "transformers": transformers_text(them.model, prompt, _TEXT_TOKENS)
    }
    for name, engine in them.engines.items():
        runs[name] = engine_text(engine, prompt, _TEXT_TOKENS)
    outputs = {name: run() for name, run in runs.items()}
    times = _per_token(time_in_turns(runs, rounds), _TEXT_TOKENS)
    table = TableOfFigures(
        "One token, ms, weights by format", ("", "ms a token", "quartiles", "faster", "same tokens")
    )
    for name, found in times.items():
        same = outputs[name] == outputs["transformers"]
        faster = ratio(times["transformers"], found)
        table.rows.append(
            (name, _ms(found), _spread(found), f"{faster[0]:.2f}x", "yes" if same else "no")
        )
        table.figures[name] = found.report() | {"faster": faster, "same_tokens": same}
    return table


def passes(them: Contestants, rounds: int) -> TableOfFigures:
    """Passes over several tokens against Transformers' pass over as many."""
    names = list(them.engines)
    table = TableOfFigures(
        "A pass behind 128 tokens, ms",
        ("tokens", "transformers", *names, *(f"{name} faster" for name in names), "/ 1 token"),
    )
    single: dict[str, Times] = {}
    for size in SIZES:
        runs = {"transformers": transformers_pass(them.model, size)}
        for name, engine in them.engines.items():
            runs[name] = engine_pass(engine, size)
        times = time_in_turns(runs, rounds)
        single = single or times
        faster = {name: ratio(times["transformers"], times[name]) for name in names}
        growth = {name: times[name].median / single[name].median for name in times}
        table.rows.append(
            (
                str(size),
                *(_ms(found) for found in times.values()),
                *(f"{faster[name][0]:.2f}x" for name in names),
                ", ".join(f"{growth[name]:.2f}" for name in names),
            )
        )
        table.figures[str(size)] = {
            name: found.report() | {"faster": faster.get(name), "to_one_token": growth[name]}
            for name, found in times.items()
        }
    return table


def bandwidth(them: Contestants, rounds: int) -> TableOfFigures:
    """Weights read in a second of a one-token pass against a plain read of memory."""
    memory = torch.ones(_PLAIN_READ_BYTES // 4)
    numbers = memory.numpy().view(np.int64)
    reads: dict[str, Callable[[], object]] = {
        "plain read: torch.dot": lambda: torch.dot(memory, memory),
        "plain read: torch.sum": memory.sum,
        "plain read: numpy or": lambda: np.bitwise_or.reduce(numbers),
    }
    passes_over_one = {name: engine_pass(engine, 1) for name, engine in them.engines.items()}
    times = time_in_turns(reads | passes_over_one, rounds)
    sizes = dict.fromkeys(reads, _PLAIN_READ_BYTES)
    sizes |= {name: engine.weight_bytes for name, engine in them.engines.items()}
    speeds = {name: sizes[name] / times[name].median for name in times}
    best = max(speeds[name] for name in reads)
    table = TableOfFigures(
        "Weights read in a pass over one token", ("", "MB", "ms", "GB/s", "of the best plain read")
    )
    for name, speed in speeds.items():
        row = (name, f"{sizes[name] / 1e6:.0f}", _ms(times[name]), f"{speed / 1e9:.1f}")
        table.rows.append((*row, f"{speed / best:.0%}"))
        table.figures[name] = times[name].report() | {
            "bytes": sizes[name],
            "bytes_per_second": speed,
            "of_plain_read": speed / best,
        }
    return table


def sessions(them: Contestants, rounds: int) -> TableOfFigures:
    """Sessions that decode in one pass: tokens a second against one session alone."""
    table = TableOfFigures(
        "Sessions in one pass, one token each", ("", "sessions", "ms", "tokens/s", "against 1")
    )
    for name, engine in them.engines.items():
        runs = {str(count): engine_pass(engine, 1, count) for count in (1, 4, engine.max_batch)}
        times = time_in_turns(runs, rounds)
        for count, found in times.items():
            rate = int(count) / found.median
            gain = int(count) * times["1"].median / found.median
            table.rows.append((name, count, _ms(found), f"{rate:.0f}", f"{gain:.2f}x"))
            table.figures[f"{name}, {count} sessions"] = found.report() | {
                "tokens_per_second": rate,
                "gain": gain,
            }
    return table


def numerics(bench: Bench, rounds: int) -> TableOfFigures:
    """Passes with numerics exact against fast, as the engine runs this number format."""
    engines = {one.value: bench.engine(numerics=one) for one in Numerics}
    dtype = engines["fast"].description.dtype
    table = TableOfFigures(
        f"Numerics exact against fast, {dtype}, ms a pass", ("tokens", "fast", "exact", "costs")
    )
    for size in (1, 4, 8):
        times = time_in_turns(
            {name: engine_pass(engine, size) for name, engine in engines.items()}, rounds
        )
        costs = ratio(times["exact"], times["fast"])
        table.rows.append((str(size), _ms(times["fast"]), _ms(times["exact"]), f"{costs[0]:.2f}x"))
        table.figures[str(size)] = {name: found.report() for name, found in times.items()} | {
            "costs": costs
        }
    return table


def _per_token(times: dict[str, Times], count: int) -> dict[str, Times]:
    return {
        name: Times(tuple(seconds / count for seconds in found.seconds))
        for name, found in times.items()
    }


def _ms(times: Times) -> str:
    return f"{1e3 * times.median:.2f}"


def _spread(times: Times) -> str:
    low, high = times.quartiles
    return f"{1e3 * low:.2f} to {1e3 * high:.2f}"
