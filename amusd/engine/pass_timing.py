"""What a pass of an engine takes, by the number of its tokens."""

import statistics
import time
from collections.abc import Sequence

from amusd.engine.interface import Engine, ScheduledSequence


def median_pass_seconds(
    engine: Engine, sizes: Sequence[int], repeat: int, context: int = 100
) -> dict[int, float]:
    """Time passes over each of ``sizes`` tokens behind ``context`` others, in turns."""
    known = engine.description.output_size
    slot = engine.open(context + max(sizes))
    try:
        engine.run(
            [ScheduledSequence(slot, [token % known for token in range(10, 10 + context)], 1)]
        )
        times: dict[int, list[float]] = {size: [] for size in sizes}
        for _ in range(repeat):
            for size in sizes:
                started = time.perf_counter()
                engine.run(
                    [
                        ScheduledSequence(
                            slot, [token % known for token in range(20, 20 + size)], size
                        )
                    ]
                )
                times[size].append(time.perf_counter() - started)
                engine.truncate(slot, context)
    finally:
        engine.close(slot)
    return {size: statistics.median(found) for size, found in times.items()}
