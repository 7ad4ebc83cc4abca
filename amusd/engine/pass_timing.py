"""The time of an engine's forward pass by its number of tokens."""

import statistics
import time
from collections.abc import Sequence

from amusd.engine.interface import Engine, ScheduledSequence


def median_pass_seconds(
    engine: Engine, sizes: Sequence[int], repeat: int, context: int = 100
) -> dict[int, float]:
    """Return the median seconds of a pass for each number of tokens in ``sizes``.

    The tokens follow ``context`` cached ones. The sizes take turns, ``repeat`` times.
    """
    slot = engine.open(context + max(sizes))
    try:
        engine.run([ScheduledSequence(slot, _tokens(engine, 10, context), 1)])
        times: dict[int, list[float]] = {size: [] for size in sizes}
        for _ in range(repeat):
            for size in sizes:
                scheduled = ScheduledSequence(slot, _tokens(engine, 20, size), size)
                started = time.perf_counter()
                engine.run([scheduled])
                times[size].append(time.perf_counter() - started)
                engine.truncate(slot, context)
    finally:
        engine.close(slot)
    return {size: statistics.median(found) for size, found in times.items()}


def _tokens(engine: Engine, first: int, count: int) -> list[int]:
    """Return ``count`` tokens of the model's vocabulary."""
    return [token % engine.description.output_size for token in range(first, first + count)]
