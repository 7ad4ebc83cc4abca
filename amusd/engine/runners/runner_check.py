"""Decides by the self-checks whether a runner is right for a model, within a bound of time.

The check of a runner costs 10 forward passes over about 3 times the tokens of its longest text.
That text passes each length where the configuration says that attention or rotary angles change,
as far as the bound allows.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from amusd.engine.loading.model_source import LoadedModel
from amusd.engine.runners.model_traits import window_lengths
from amusd.engine.runners.runner import ModelRunner, RunnerRefusedError
from amusd.engine.runners.self_check import MISFITS, ExpectedLogits, largest_difference

_BASE_LENGTH = 16
_BEYOND = 4  # tokens behind the last length where something changes
_MAX_LENGTH = 8192
_CPU_OPERATIONS = 2e11  # of a pass over the longest text: a few seconds on few cores
_DEVICE_OPERATIONS = 2e13  # of a pass on another device
_TOLERANCE = 0.1
_FLOAT32_TOLERANCE = 1e-4
"""A wrong mask changes a row by about its size, rounding by 0.01 in bfloat16, 1e-6 in float32."""


class RunnerCheck:
    """Compares runners of one model with the model alone."""

    def __init__(self, loaded: LoadedModel, rope_switch: int | None, max_length: int) -> None:
        """Check with texts of at most ``max_length`` tokens, the context of the model.

        Texts of more than ``rope_switch`` tokens have other rotary factors; None: they do not.
        """
        self._loaded = loaded
        self._rope_switch = rope_switch
        self._changes = [*window_lengths(loaded.model), *([rope_switch] if rope_switch else [])]
        self._context = max_length
        self.length = self._longest_text(max_length)  # tokens of the longest text
        is_float32 = loaded.model.dtype is torch.float32
        self._tolerance = _FLOAT32_TOLERANCE if is_float32 else _TOLERANCE
        self.difference = math.nan  # of the last runner that passed
        self.seconds = 0.0  # of all checks

    @cached_property
    def _expected(self) -> ExpectedLogits:
        found = self._loaded.description
        return ExpectedLogits.of(
            self._loaded.model, found.output_size, self.length, self._rope_switch
        )

    def shortened(self, max_length: int) -> "RunnerCheck":
        """Return a check for a runner that takes at most ``max_length`` tokens."""
        if self.length <= max_length:
            return self
        return RunnerCheck(self._loaded, self._rope_switch, max_length)

    def __str__(self) -> str:
        """Return what the last check that passed found, for the log."""
        missed = [change for change in self._changes if self.length <= change < self._context]
        beyond = f", not beyond {min(missed)} tokens, which takes too long" if missed else ""
        return (
            f"logits differ from those of the model alone by {self.difference:.1g} of their size "
            f"(checked with texts of up to {self.length} tokens{beyond}, in {self.seconds:.1f} s)"
        )

    def refuse_if_wrong(self, runner: ModelRunner[Any], reuses_prefixes: bool = True) -> None:
        """Raise RunnerRefusedError if the runner's logits are not those of the model alone.

        Args:
            runner: the runner.
            reuses_prefixes: whether it can copy a prefix.
        """
        start = time.perf_counter()
        with misfits_refused():
            difference = largest_difference(runner, self._expected, reuses_prefixes)
        self.seconds += time.perf_counter() - start
        if not difference <= self._tolerance:
            raise RunnerRefusedError(
                f"its logits differ from those of the model alone by {difference:.2g} of their "
                f"size, and {self._tolerance} is allowed"
            )
        self.difference = difference

    def _longest_text(self, context: int) -> int:
        """Return the tokens of the longest text, beyond each change that the bound allows."""
        is_cpu = self._loaded.model.device.type == "cpu"
        operations = _CPU_OPERATIONS if is_cpu else _DEVICE_OPERATIONS
        num_parameters = max(1, self._loaded.description.num_parameters)
        most = min(context, _MAX_LENGTH, int(operations / (2 * num_parameters)))
        reached = [change + _BEYOND for change in self._changes if change + _BEYOND <= most]
        return min(context, max(_BASE_LENGTH, *reached, 0))


@contextmanager
def misfits_refused() -> Iterator[None]:
    """Turn what a model raises that does not fit a runner into a refusal."""
    try:
        yield
    except MISFITS as error:
        text = str(error).strip().partition("\n")[0]
        raise RunnerRefusedError(f"{type(error).__name__}: {text}") from error
