"""The performance model against traces of PipeSpec, which others measured on other hardware.

``python -m benchmarks.trace_check --traces pipespec-humaneval-traces.json`` compares the total time
of each run with two models. A start-up time of a request and an overhead of a round are fitted on
every other run, and have to hold for the rest.
"""

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from amusd.cli import reporting_errors
from amusd.performance.agreement import KnownAgreement
from amusd.performance.clocked_verify import PassRules
from amusd.performance.deployment import Deployment, StepSeconds
from amusd.performance.simulation import SERVICE_LOOKAHEAD, Method, Simulation
from amusd.policy.published_policy import Published
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.strategy import Strategy

_CHAIN, _ASYNC = "chain", "async-chain"
_NEVER = 1e9  # seconds: these drafts are never lost


@dataclass(frozen=True)
class TraceSample:
    """One request of a run."""

    seconds: float
    num_tokens: int
    draft_seconds: float
    pass_seconds: float
    accepted: tuple[int, ...]
    """Final tokens of each round: the right proposals, and the correction of a wrong one."""

    @property
    def ends(self) -> tuple[int, ...]:
        """Position in the output behind each round."""
        return tuple(accumulate(self.accepted))


@dataclass(frozen=True)
class TraceRun:
    """All requests of one setting of two models; ``lookahead`` is that of the traces."""

    models: tuple[str, ...]
    is_asynchronous: bool
    lookahead: int
    samples: tuple[TraceSample, ...]

    @property
    def name(self) -> str:
        """Its setting in words."""
        kind = _ASYNC if self.is_asynchronous else _CHAIN
        sizes = "/".join(model.split("-")[-2] for model in self.models)
        return f"{sizes} {kind} {self.lookahead}"

    @property
    def seconds(self) -> float:
        """Measured time of all requests."""
        return sum(sample.seconds for sample in self.samples)

    @property
    def num_rounds(self) -> int:
        """Passes of the verify model."""
        return sum(len(sample.accepted) for sample in self.samples)


def load_runs(path: Path) -> list[TraceRun]:
    """Return the runs of two models.

    Raises:
        InvalidInputError: the file cannot be read, or is no trace file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["runs"]
        return [_run(one) for one in found if len(one["models"]) == 2]
    except OSError as error:
        raise InvalidInputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError):
        raise InvalidInputError(f"{path} is no file of PipeSpec traces") from None


def _run(found: dict[str, Any]) -> TraceRun:
    samples = tuple(
        TraceSample(
            one["total_time"],
            one["tokens_generated"],
            one["model_time_median"][0],
            one["model_time_median"][1],
            tuple(one["accepted_tokens"][0]),
        )
        for one in found["samples"]
    )
    is_asynchronous = found["strategy"] == _ASYNC
    return TraceRun(tuple(found["models"]), is_asynchronous, found["lookahead"], samples)


class TraceTexts:
    """Where the draft is wrong in each request of a pair of models, as its chain runs show it."""

    def __init__(self, chains: Sequence[TraceRun]) -> None:
        """Take the chain run with the largest look-ahead: the fewest of its rounds are full."""
        run = max(chains, key=lambda one: one.lookahead)
        self.wrong = [frozenset(_wrong_positions(one, run.lookahead)) for one in run.samples]


def _wrong_positions(sample: TraceSample, lookahead: int) -> Iterator[int]:
    """Yield the positions of corrections; a full round has none."""
    for end, accepted in zip(sample.ends, sample.accepted, strict=True):
        if accepted < lookahead:
            yield end - 1


def simulated_seconds(run: TraceRun, texts: TraceTexts) -> float:
    """Return the simulated time of all requests, without start-up and overhead."""
    fresh = _num_fresh(run, texts) if run.is_asynchronous else 0
    total = 0.0
    for sample, wrong in zip(run.samples, texts.wrong, strict=True):
        deployment = Deployment(
            StepSeconds.constant(sample.draft_seconds),
            StepSeconds.constant(sample.pass_seconds),
            acceptance=(1.0,),
        )
        # The simulation's first pass is the prefill, and yields a token.
        text = KnownAgreement(frozenset(position + 2 for position in wrong))
        method = _method(run, fresh)
        simulated = Simulation(deployment, method, sum(sample.accepted) + 1, [text]).run()
        total += simulated.seconds
    return total


def _method(run: TraceRun, num_fresh: int) -> Method:
    if not run.is_asynchronous:
        rules = PassRules(run.lookahead, takes_bonus=False)
        return Method(Strategy.SPECULATIVE, run.lookahead, own_rules=rules)
    least = max(1, run.lookahead)
    return Method(
        Strategy.AMUSD,
        SERVICE_LOOKAHEAD,
        own_policy=lambda: Published(_NEVER, max(num_fresh, least), least),
        own_rules=PassRules(least, takes_bonus=False),
    )


def _num_fresh(run: TraceRun, texts: TraceTexts) -> int:
    """Return how many tokens a pass after a rejection checks, as the trace shows it.

    A round that ends without a correction has accepted all that it checked.
    """
    sizes: Counter[int] = Counter()
    for sample, wrong in zip(run.samples, texts.wrong, strict=True):
        for (before, end), accepted in zip(pairwise(sample.ends), sample.accepted[1:], strict=True):
            if before - 1 in wrong and end - 1 not in wrong:
                sizes[accepted] += 1
    return sizes.most_common(1)[0][0] if sizes else 1


@dataclass(frozen=True, slots=True)
class Fit:
    """Seconds of a request's start, and of a round, that the step times leave out."""

    start_seconds: float
    round_seconds: float

    @classmethod
    def of(cls, runs: Sequence[TraceRun], simulated: Sequence[float]) -> "Fit":
        """Return the least squares of the relative errors; neither time is negative."""
        rows = [
            (
                len(run.samples) / run.seconds,
                run.num_rounds / run.seconds,
                1.0 - seconds / run.seconds,
            )
            for run, seconds in zip(runs, simulated, strict=True)
        ]
        ss = sum(s * s for s, _, _ in rows)
        sr = sum(s * r for s, r, _ in rows)
        rr = sum(r * r for _, r, _ in rows)
        sy, ry = sum(s * y for s, _, y in rows), sum(r * y for _, r, y in rows)
        determinant = ss * rr - sr * sr
        start = (sy * rr - ry * sr) / determinant if determinant else 0.0
        overhead = (ry * ss - sy * sr) / determinant if determinant else 0.0
        if start < 0.0:
            return cls(0.0, max(0.0, ry / rr))
        return cls(max(0.0, sy / ss), 0.0) if overhead < 0.0 else cls(start, overhead)

    def seconds(self, run: TraceRun, simulated: float) -> float:
        """Return the predicted time of a run."""
        starts = len(run.samples) * self.start_seconds
        return simulated + starts + run.num_rounds * self.round_seconds


@dataclass(frozen=True, slots=True)
class Checked:
    """A run with its predicted time; ``is_fitted``: it took part in the fit."""

    run: TraceRun
    predicted_seconds: float
    is_fitted: bool

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted_seconds / self.run.seconds - 1.0


def check(runs: Sequence[TraceRun], fits_odd: bool = False) -> tuple[Fit, list[Checked]]:
    """Fit on every other run, from the first or from the second one on, and predict all of them."""
    texts = {
        pair: TraceTexts([one for one in runs if one.models == pair and not one.is_asynchronous])
        for pair in {run.models for run in runs}
    }
    simulated = [simulated_seconds(run, texts[run.models]) for run in runs]
    fit = Fit.of(runs[fits_odd::2], simulated[fits_odd::2])
    return fit, [
        Checked(run, fit.seconds(run, seconds), index % 2 == fits_odd)
        for index, (run, seconds) in enumerate(zip(runs, simulated, strict=True))
    ]


def main(
    traces: Annotated[Path, typer.Option(help="File of PipeSpec traces.")],
    fits_odd: Annotated[
        bool, typer.Option("--fits-odd", help="Fit on the other half of the runs.")
    ] = False,
) -> None:
    """Print the error of each run."""
    fit, checked = check(load_runs(traces), fits_odd)
    start_ms, round_ms = 1e3 * fit.start_seconds, 1e3 * fit.round_seconds
    print(f"fitted: {start_ms:.0f} ms a request, {round_ms:.2f} ms a round")
    for one in checked:
        kind = "fitted" if one.is_fitted else "held out"
        print(
            f"{one.run.name:24} {kind:8} measured {one.run.seconds:7.2f} s  "
            f"model {one.predicted_seconds:7.2f} s  error {one.error:+.1%}"
        )
    held_out = [abs(one.error) for one in checked if not one.is_fitted]
    mean, largest = statistics.mean(held_out), max(held_out)
    print(f"held out: mean error {mean:.1%}, largest {largest:.1%}")


if __name__ == "__main__":
    reporting_errors(lambda: typer.run(main))
