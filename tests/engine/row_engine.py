"""An engine whose KV cache is a pool of rows, for tests that make their own runner."""

from dataclasses import replace
from typing import Any

from amusd.engine.model_engine import ModelEngine
from amusd.engine.runners.runner import ModelRunner
from amusd.engine.runners.selection import RunnerSelection
from amusd.fleet.model_description import ModelDescription


def row_engine(
    description: ModelDescription,
    runner: ModelRunner[Any],
    num_rows: int,
    length: int,
    **changes: Any,
) -> ModelEngine:
    """Return an engine with ``num_rows`` rows of ``length`` tokens, without prefix reuse.

    ``changes`` are fields of the runner selection.
    """
    selection = RunnerSelection(
        runner=runner,
        reason="",
        max_batch=num_rows,
        reuse_prefixes=False,
        max_tokens=num_rows * length,
        context_length=length,
        unit=length,
    )
    return ModelEngine(description, replace(selection, **changes))
