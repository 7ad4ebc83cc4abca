"""The performance model against a report of the grid of synthetic models.

``python -m benchmarks.model_check --grid grid.json`` simulates each strategy of each combination on
the same texts, and prints the errors. The model gets the measured times of a pass and of the first
token of each run, and of a draft step of each combination. The time of a message is fitted on every
other combination, and has to hold for the rest.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from amusd.cli import reporting_errors
from amusd.engine.synthetic import SyntheticModel
from amusd.performance.agreement import RIGHT, WRONG, Agreement
from amusd.performance.deployment import Branching, Deployment, MessageSeconds, StepSeconds
from amusd.performance.simulation import (
    AMUSD,
    AUTOREGRESSIVE,
    BRANCHES,
    PUBLISHED,
    Method,
    Simulation,
    speculative,
)
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.strategy import Strategy

_VOCABULARY = 4096
_MOST_MESSAGE_SECONDS = 2e-3
_NUM_TRIES = 5


class SyntheticAgreement:
    """Where a synthetic draft agrees with the verify model on one output."""

    def __init__(self, draft: SyntheticModel, prompt: tuple[int, ...], num_tokens: int) -> None:
        """Write ``num_tokens`` behind ``prompt`` with the verify model, a draft always right."""
        verify = SyntheticModel(vocabulary=draft.vocabulary)
        tokens = list(prompt)
        self._is_right: list[bool] = []
        self._next_best: list[tuple[int, ...]] = []
        for _ in range(num_tokens):
            token = verify.next_token(tokens)
            self._is_right.append(draft.next_token(tokens) == token)
            others = draft.next_best(tokens)
            found = (RIGHT if one == token else 2 + rank for rank, one in enumerate(others))
            self._next_best.append(tuple(found))
            tokens.append(token)

    def draft_token(self, position: int, place: int) -> int:
        """Return the draft's token; position 1 is the first of the output."""
        return RIGHT if self._is_right[position - 1] else WRONG

    def next_best(self, position: int, place: int) -> tuple[int, ...]:
        """Return the draft's next-best tokens."""
        return self._next_best[position - 1]


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """One strategy in one combination of the grid."""

    agreement: float
    ratio: float
    latency_seconds: float
    alternatives: int
    num_prompts: int
    strategy: str
    num_tokens: int
    seconds_per_token: float
    first_token_seconds: float
    pass_seconds: float
    draft_seconds: float

    @property
    def method(self) -> Method:
        """The simulated method of its strategy."""
        word, _, number = self.strategy.partition(":")
        if word == "published":
            return PUBLISHED
        if word == Strategy.AUTOREGRESSIVE.value:
            return AUTOREGRESSIVE
        if word == Strategy.SPECULATIVE.value:
            return speculative(int(number or 5))
        return BRANCHES if self.alternatives else AMUSD

    def simulate(self, message_seconds: float) -> float:
        """Return the simulated seconds per token, for messages that take so long to handle."""
        hop = self.latency_seconds
        deployment = Deployment(
            draft=StepSeconds.constant(self.draft_seconds),
            verify=StepSeconds.constant(self.pass_seconds),
            acceptance=(self.agreement,),
            messages=MessageSeconds.by_hop(hop, hop, message_seconds),
            branching=Branching.of_total(0.8, self.alternatives) if self.alternatives else None,
        )
        each = self.num_tokens // self.num_prompts
        texts = _texts(self.agreement, self.alternatives, self.num_prompts, each)
        total = sum(Simulation(deployment, self.method, each, [one]).run().seconds for one in texts)
        first = self.pass_seconds + hop + message_seconds  # what the simulation takes for it
        start = max(0.0, self.first_token_seconds - first)
        return (total + self.num_prompts * start) / self.num_tokens


@cache
def _texts(
    agreement: float, alternatives: int, num_prompts: int, num_tokens: int
) -> tuple[Agreement, ...]:
    draft = SyntheticModel(vocabulary=_VOCABULARY, agreement=agreement, alternatives=alternatives)
    return tuple(
        SyntheticAgreement(draft, (number, number + 1), num_tokens + 1)
        for number in range(num_prompts)
    )


def load_cells(path: Path) -> list[list[MeasuredRun]]:
    """Return the runs of each combination of a report of the grid.

    Raises:
        InvalidInputError: the file cannot be read, or has no speculative runs.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return [list(_runs(report, cell)) for cell in report["cells"]]
    except OSError as error:
        raise InvalidInputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, ArithmeticError):
        raise InvalidInputError(
            f"{path} is no report of the grid with speculative among its strategies"
        ) from None


def _runs(report: dict[str, Any], cell: dict[str, Any]) -> Iterator[MeasuredRun]:
    draft_seconds = _draft_seconds(cell["runs"])
    for run in cell["runs"]:
        seconds_per_token = 1e-3 * run["ms_per_token"]
        yield MeasuredRun(
            cell["agreement"],
            cell["ratio"],
            1e-3 * cell.get("latency_ms", 0.0),
            report["alternatives"],
            report["num_prompts"],
            run["strategy"],
            run["tokens"],
            seconds_per_token,
            1e-3 * run["time_to_first_token_ms"],
            run["verify_busy"] * seconds_per_token * run["tokens"] / run["passes"],
            draft_seconds,
        )


def _draft_seconds(runs: Sequence[dict[str, Any]]) -> float:
    """Return the time of a draft step: in lockstep each step's token is counted."""
    lockstep = [run for run in runs if run["strategy"].startswith(Strategy.SPECULATIVE.value)]
    busy = sum(1e-3 * run["ms_per_token"] * run["tokens"] * run["draft_busy"] for run in lockstep)
    return float(busy / sum(run["drafted"] for run in lockstep))


def fit_message_seconds(runs: Sequence[MeasuredRun]) -> float:
    """Return the time of a message with the least mean error over ``runs``."""
    low, high = 0.0, _MOST_MESSAGE_SECONDS
    for _ in range(_NUM_TRIES):
        third = (high - low) / 3
        left, right = _mean_error(runs, low + third), _mean_error(runs, high - third)
        low, high = (low, high - third) if left < right else (low + third, high)
    return (low + high) / 2


def _mean_error(runs: Sequence[MeasuredRun], message_seconds: float) -> float:
    return statistics.mean(
        abs(one.simulate(message_seconds) / one.seconds_per_token - 1.0) for one in runs
    )


def main(
    grid: Annotated[list[Path], typer.Option(help="Report of the grid; several are joined.")],
    message_ms: Annotated[
        float | None,
        typer.Option(min=0, help="Time of a message in ms.", show_default="fitted"),
    ] = None,
) -> None:
    """Print the error of each strategy in each combination."""
    cells = [cell for path in grid for cell in load_cells(path)]
    fitted = [one for cell in cells[::2] for one in cell if one.method is not AUTOREGRESSIVE]
    is_fit = message_ms is None
    message_seconds = fit_message_seconds(fitted) if is_fit else 1e-3 * (message_ms or 0.0)
    print(f"a message takes {1e3 * message_seconds:.2f} ms" + (", fitted" if is_fit else ""))
    held_out: list[float] = []
    for index, cell in enumerate(cells):
        is_fitted = is_fit and index % 2 == 0
        for one in cell:
            simulated = one.simulate(message_seconds)
            error = simulated / one.seconds_per_token - 1.0
            if not is_fitted and one.method is not AUTOREGRESSIVE:
                held_out.append(abs(error))
            print(
                f"pass {1e3 * one.pass_seconds:g} ms, hop {1e3 * one.latency_seconds:g} ms, "
                f"agree {one.agreement:g}, d/v {one.ratio:g}, {one.strategy:14} "
                f"measured {1e3 * one.seconds_per_token:6.2f}  model {1e3 * simulated:6.2f} "
                f"ms/token  error {error:+.1%}{' (fitted)' if is_fitted else ''}"
            )
    if held_out:
        within = sum(error <= 0.1 for error in held_out) / len(held_out)
        print(
            f"held out: mean error {statistics.mean(held_out):.1%}, largest {max(held_out):.1%}, "
            f"{within:.0%} within 10 %"
        )


if __name__ == "__main__":
    reporting_errors(lambda: typer.run(main))
