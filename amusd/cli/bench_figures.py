"""What a report of ``amusd bench`` says of a deployment: step times, acceptance, measured times."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from amusd.performance.deployment import StepSeconds
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.strategy import Strategy

_MIN_CHECKED = 30  # places that were compared less often are pooled with the one before


@dataclass(frozen=True, slots=True)
class BenchFigures:
    """Figures of a report; ``measured_seconds`` are those per token, by the name of the run."""

    draft: StepSeconds
    verify: StepSeconds
    acceptance: tuple[float, ...]
    measured_seconds: dict[str, float]


def load_bench(path: Path) -> BenchFigures:
    """Read a report.

    Raises:
        InvalidInputError: the file cannot be read, is no such report, or lacks a strategy.
    """
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        served = [run for run in runs if run.get("passes")]
        return BenchFigures(
            StepSeconds.constant(_draft_seconds(served)),
            _pass_seconds(served),
            tuple(_acceptance(_drafted_run(served)["acceptance_per_position"])),
            {run["strategy"]: 1e-3 * run["ms_per_token"] for run in served},
        )
    except OSError as error:
        raise InvalidInputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError):
        raise InvalidInputError(
            f"{path} is no report of amusd bench with the strategies autoregressive and "
            "speculative: write one with --output"
        ) from None


def _is_speculative(run: dict[str, Any]) -> bool:
    return bool(run["strategy"].partition(":")[0] == Strategy.SPECULATIVE.value)


def _drafted_run(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the speculative run with the most places: there a place in a pass is one in a run."""
    speculative = [run for run in runs if _is_speculative(run)]
    return max(speculative, key=lambda run: len(run["acceptance_per_position"]))


def _seconds(run: dict[str, Any]) -> float:
    return float(1e-3 * run["ms_per_token"] * run["tokens"])


def _draft_seconds(runs: list[dict[str, Any]]) -> float:
    """Return the time of a draft step, from the run in which each step's token is counted."""
    run = _drafted_run(runs)
    return float(run["draft_busy"] * _seconds(run) / run["drafted"])


def _pass_seconds(runs: list[dict[str, Any]]) -> StepSeconds:
    """Return the pass times of plain decoding and of each speculative look-ahead."""
    found: dict[int, float] = {}
    for run in runs:
        is_plain = run["strategy"] == Strategy.AUTOREGRESSIVE.value
        if is_plain or _is_speculative(run):
            size = 1 if is_plain else 1 + len(run["acceptance_per_position"])
            found[size] = run["verify_busy"] * _seconds(run) / run["passes"]
    if 1 not in found:
        raise LookupError(Strategy.AUTOREGRESSIVE.value)
    sizes = sorted(found)
    # A larger pass takes no less time: what says otherwise is noise.
    return StepSeconds(tuple(sizes), tuple(accumulate((found[size] for size in sizes), max)))


def _acceptance(positions: list[dict[str, int]]) -> Iterator[float]:
    """Yield the acceptance of each place, and for the last ones together that of all of them."""
    enough = [one for one in positions if one["checked"] >= _MIN_CHECKED] or positions[:1]
    for one in enough[:-1]:
        yield one["accepted"] / one["checked"]
    rest = positions[len(enough) - 1 :]
    yield sum(one["accepted"] for one in rest) / sum(one["checked"] for one in rest)
