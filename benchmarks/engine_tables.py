"""Tables about one model on CPU, compared with Transformers or with another configuration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from amusd.engine.interface import Numerics, WeightFormat
from amusd.engine.model_engine import ModelEngine
from benchmarks.engines import (
    Bench,
    engine_pass,
    engine_text,
    transformers_pass,
    transformers_text,
)
from benchmarks.rounds import Times, ratio, time_interleaved

FORMATS = (WeightFormat.COMPACT, WeightFormat.PLAIN)
"""Lossless weight formats."""

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
    """The model in Transformers, and engines by their weight format."""

    model: PreTrainedModel
    engines: dict[str, ModelEngine]

    @classmethod
    def of(cls, bench: Bench, formats: Sequence[WeightFormat] = FORMATS) -> "Contestants":
        """Load the model and the engines; formats that the engine treats alike appear once."""
        engines: dict[str, ModelEngine] = {}
        for weights in formats:
            engine = bench.engine(weights)
            engines.setdefault(engine.weight_format, engine)
        return cls(bench.load().model, engines)


def one_token(contestants: Contestants, rounds: int) -> TableOfFigures:
    """Compare autoregressive decoding with ``generate``: 32 tokens after a short prompt."""
    prompt = [token % contestants.model.config.vocab_size for token in _PROMPT]
    runs: dict[str, Callable[[], list[int]]] = {
        "transformers": transformers_text(contestants.model, prompt, _TEXT_TOKENS)
    }
    for name, engine in contestants.engines.items():
        runs[name] = engine_text(engine, prompt, _TEXT_TOKENS)
    outputs = {name: run() for name, run in runs.items()}
    texts = time_interleaved(runs, rounds)
    times = {name: found.scaled(1 / _TEXT_TOKENS) for name, found in texts.items()}
    table = TableOfFigures(
        "One token, ms, weights by format", ("", "ms a token", "quartiles", "faster", "same tokens")
    )
    for name, found in times.items():
        same = outputs[name] == outputs["transformers"]
        faster = ratio(times["transformers"], found)
        table.rows.append(
            (name, ms(found), _spread(found), f"{faster[0]:.2f}x", "yes" if same else "no")
        )
        table.figures[name] = found.report() | {"faster": faster, "same_tokens": same}
    return table


def passes(contestants: Contestants, rounds: int) -> TableOfFigures:
    """Compare passes over several tokens with Transformers' passes, and with one over one token."""
    engines = list(contestants.engines)
    names = ["transformers", *engines]
    runs: dict[str, Callable[[], object]] = {}
    for size in SIZES:
        runs[_label("transformers", size)] = transformers_pass(contestants.model, size)
        for name, engine in contestants.engines.items():
            runs[_label(name, size)] = engine_pass(engine, size)
    times = time_interleaved(runs, rounds)
    table = TableOfFigures(
        "A pass after 128 cached tokens, ms",
        ("tokens", *names, *(f"{name} faster" for name in engines), "/ 1 token"),
    )
    for size in SIZES:
        found = {name: times[_label(name, size)] for name in names}
        faster = {name: ratio(found["transformers"], found[name]) for name in engines}
        growth = {name: ratio(found[name], times[_label(name, 1)]) for name in names}
        table.rows.append(
            (
                str(size),
                *(ms(found[name]) for name in names),
                *(f"{faster[name][0]:.2f}x" for name in engines),
                ", ".join(f"{growth[name][0]:.2f}" for name in engines),
            )
        )
        table.figures[str(size)] = {
            name: found[name].report() | {"faster": faster.get(name), "to_one_token": growth[name]}
            for name in names
        }
    return table


def bandwidth(contestants: Contestants, rounds: int) -> TableOfFigures:
    """Compare the bandwidth of weights in a one-token pass with a plain read of memory."""
    memory = torch.ones(_PLAIN_READ_BYTES // 4)
    numbers = memory.numpy().view(np.int64)
    reads: dict[str, Callable[[], object]] = {
        "plain read: torch.dot": lambda: torch.dot(memory, memory),
        "plain read: torch.sum": memory.sum,
        "plain read: numpy or": lambda: np.bitwise_or.reduce(numbers),
    }
    passes_over_one = {name: engine_pass(engine, 1) for name, engine in contestants.engines.items()}
    times = time_interleaved(reads | passes_over_one, rounds)
    sizes = dict.fromkeys(reads, _PLAIN_READ_BYTES)
    sizes |= {name: engine.weight_bytes for name, engine in contestants.engines.items()}
    per_byte = {name: times[name].scaled(1 / sizes[name]) for name in times}
    best = per_byte[min(reads, key=lambda name: per_byte[name].median)]
    table = TableOfFigures(
        "Weights read in a pass over one token", ("", "MB", "ms", "GB/s", "of the best plain read")
    )
    for name, found in per_byte.items():
        share = ratio(best, found)
        row = (name, f"{sizes[name] / 1e6:.0f}", ms(times[name]), f"{1e-9 / found.median:.1f}")
        table.rows.append((*row, f"{share[0]:.0%}"))
        table.figures[name] = times[name].report() | {
            "bytes": sizes[name],
            "bytes_per_second": 1 / found.median,
            "of_plain_read": share,
        }
    return table


def sessions(contestants: Contestants, rounds: int) -> TableOfFigures:
    """Compare the tokens a second of batched sessions with those of one session."""
    table = TableOfFigures(
        "Batched sessions, one token each", ("", "sessions", "ms", "tokens/s", "against 1")
    )
    for name, engine in contestants.engines.items():
        counts = [count for count in (1, 4, 8) if count <= engine.max_batch]
        runs = {str(count): engine_pass(engine, 1, count) for count in counts}
        times = time_interleaved(runs, rounds)
        for count in counts:
            found = times[str(count)]
            per_token = found.scaled(1 / count)
            gain = ratio(times["1"], per_token)
            rate = 1 / per_token.median
            table.rows.append((name, str(count), ms(found), f"{rate:.0f}", f"{gain[0]:.2f}x"))
            table.figures[f"{name}, {count} sessions"] = found.report() | {
                "tokens_per_second": rate,
                "gain": gain,
            }
    return table


def numerics(bench: Bench, rounds: int) -> TableOfFigures:
    """Compare passes with numerics exact and fast, in the dtype of the engine."""
    engines = {one.value: bench.engine(numerics=one) for one in Numerics}
    dtype = engines["fast"].description.dtype
    table = TableOfFigures(
        f"Numerics exact against fast, {dtype}, ms a pass", ("tokens", "fast", "exact", "costs")
    )
    for size in (1, 4, 8):
        times = time_interleaved(
            {name: engine_pass(engine, size) for name, engine in engines.items()}, rounds
        )
        costs = ratio(times["exact"], times["fast"])
        table.rows.append((str(size), ms(times["fast"]), ms(times["exact"]), f"{costs[0]:.2f}x"))
        table.figures[str(size)] = {name: found.report() for name, found in times.items()} | {
            "costs": costs
        }
    return table


def _label(name: str, size: int) -> str:
    return f"{name}, {size}"


def ms(times: Times) -> str:
    """Return the median for a table."""
    return f"{1e3 * times.median:.2f}"


def _spread(times: Times) -> str:
    low, high = times.quartiles
    return f"{1e3 * low:.2f} to {1e3 * high:.2f}"
