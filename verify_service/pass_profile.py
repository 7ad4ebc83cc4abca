"""A short profile of a verify engine: the time of its passes by their number of rows.

It runs once, before the service serves. Passes with sessions refine it.
"""

import time

from amusd.engine.interface import Engine, ScheduledSequence
from amusd.policy.row_budget import RowBudget

_SIZES = (1, 2, 4, 8, 16, 32)  # rows
_MAX_SECONDS = 0.4
_ROUNDS = 3


def profile_passes(engine: Engine, budget: RowBudget) -> None:
    """Let ``budget`` learn the pass times, small passes first, within 0.4 s and one pass.

    Raises:
        AmusdError: the engine has no memory for a sequence, or a pass fails.
    """
    if not engine.description.output_size:
        return  # there is no model
    sizes = [size for size in _SIZES if size < engine.usage.max_tokens]
    slot = engine.open(max(sizes, default=1) + 1)
    ends = time.perf_counter() + _MAX_SECONDS
    try:
        engine.run([ScheduledSequence(slot, [0], 1)])
        for _ in range(_ROUNDS):
            for size in sizes:
                started = time.perf_counter()
                if started > ends:
                    return
                engine.run([ScheduledSequence(slot, [0] * size, size)])
                budget.observe(size, time.perf_counter() - started)
                engine.truncate(slot, 1)
    finally:
        engine.truncate(slot, 0)  # so that its KV cache is not retained
        engine.close(slot)
