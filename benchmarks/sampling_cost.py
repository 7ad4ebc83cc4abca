"""The time of a pass with sampling against greedy decoding, on one model."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from amusd.engine.interface import EngineOptions
from amusd.engine.runners.runner import Chunk, ModelRunner
from amusd.engine.runners.selection import select_runner
from amusd.engine.sampling.reference_sampler import LogitEdits, RowSampling
from amusd.sampling.parameters import LogprobsOptions, SamplingParameters
from benchmarks.engine_tables import TableOfFigures, ms
from benchmarks.engines import CONTEXT, Bench
from benchmarks.rounds import ratio, time_interleaved

_SIZES = (1, 4, 8)
_NUM_EDITS = 200  # tokens with penalties
_VARIANTS: dict[str, tuple[SamplingParameters, int]] = {
    "temperature": (SamplingParameters(temperature=1.0, seed=1), 0),
    "temperature, top-k": (SamplingParameters(temperature=1.0, top_k=40, seed=1), 0),
    "temperature, top-p": (SamplingParameters(temperature=1.0, top_p=0.95, seed=1), 0),
    "temperature, min-p": (SamplingParameters(temperature=1.0, min_p=0.05, seed=1), 0),
    "temperature, penalties": (
        SamplingParameters(temperature=1.0, repetition_penalty=1.1, seed=1),
        _NUM_EDITS,
    ),
    "greedy, penalties": (SamplingParameters(repetition_penalty=1.1), _NUM_EDITS),
    "greedy, logprobs": (SamplingParameters(), 0),
}


def sampling(bench: Bench, rounds: int) -> TableOfFigures:
    """Compare passes that sample with greedy ones: one sequence, one to eight outputs.

    Each variant alternates with greedy passes of the same size.
    """
    loaded = bench.load()
    runner = select_runner(loaded, EngineOptions(bench.max_batch, 1024)).runner
    table = TableOfFigures(
        f"A pass that samples against a greedy one, {runner.name} runner, ms",
        ("", "outputs", "greedy", "sampling", "ratio"),
    )
    vocabulary = loaded.description.output_size
    for size in _SIZES:
        runs: dict[str, Callable[[], object]] = {"greedy": _pass(runner, vocabulary, size, None)}
        for name, (parameters, num_edits) in _VARIANTS.items():
            rows = [_row(name, parameters, num_edits, CONTEXT + at) for at in range(size)]
            runs[name] = _pass(runner, vocabulary, size, rows)
        times = time_interleaved(runs, rounds)
        for name in _VARIANTS:
            cost = ratio(times[name], times["greedy"])
            row = (name, str(size), ms(times["greedy"]), ms(times[name]), f"{cost[0]:.3f}x")
            table.rows.append(row)
            table.figures[f"{name}, {size} outputs"] = times[name].report() | {
                "greedy": times["greedy"].report(),
                "ratio": cost,
            }
    return table


def _row(name: str, parameters: SamplingParameters, num_edits: int, position: int) -> RowSampling:
    edits = LogitEdits(
        position,
        np.arange(num_edits, dtype=np.int64),
        np.ones(num_edits, dtype=np.bool_),
        np.zeros(num_edits, dtype=np.float32),
    )
    return RowSampling(parameters, edits, LogprobsOptions(20) if "logprobs" in name else None)


def _pass(
    runner: ModelRunner[Any], vocabulary: int, size: int, rows: Sequence[RowSampling] | None
) -> Callable[[], object]:
    """Return a repeatable pass over ``size`` tokens behind a context, with as many outputs."""
    buffer = runner.allocate(CONTEXT + size)
    tokens = [token % vocabulary for token in range(10, 10 + CONTEXT + size)]
    with torch.inference_mode():
        runner.tokens([Chunk(buffer, 0, tokens[:CONTEXT], 1)])
    chunk = Chunk(buffer, CONTEXT, tokens[CONTEXT:], size, () if rows is None else rows)
    run = runner.tokens if rows is None else runner.sample
    return lambda: run([chunk])
