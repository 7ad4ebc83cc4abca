"""The options of ``amusd plan``: what they look like, and what they refuse."""

from dataclasses import dataclass
from typing import Annotated

import typer

from amusd.performance.deployment import StepSeconds
from amusd.protocol.errors import InvalidInputError


def _step_seconds(text: str) -> StepSeconds:
    """Parse ``8``, or by number of tokens ``1:8,4:8.5,16:10``, in ms."""
    sizes, times = [], []
    try:
        for entry in text.split(","):
            size, colon, ms = entry.rpartition(":")
            sizes.append(int(size) if colon else 1)
            times.append(1e-3 * float(ms))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no time in ms: write 8, or by number of tokens 1:8,4:8.5,16:10"
        ) from None
    try:
        return StepSeconds(tuple(sizes), tuple(times))
    except InvalidInputError as error:
        raise typer.BadParameter(f"{text!r}: {error}") from None


@dataclass(frozen=True, slots=True)
class Shares:
    """Acceptance by place in a run. A bare tuple would make several words of the option."""

    by_place: tuple[float, ...]


def _acceptance(text: str) -> Shares:
    """Parse ``0.8``, or by place ``0.7,0.8,0.85``."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0.0 <= one <= 1.0 for one in found):
        raise typer.BadParameter(
            f"{text!r} is no acceptance: write 0.8, or by place in a run 0.7,0.8,0.85; each 0 to 1"
        )
    return Shares(found)


def _milliseconds(value: float | None) -> float | None:
    """Refuse what is no time; a range would let NaN through."""
    if value is not None and not 0.0 <= value <= 60_000.0:
        raise typer.BadParameter(f"{value:g} is no time in ms: use 0 to 60000")
    return value


DraftMs = Annotated[
    StepSeconds | None,
    typer.Option(
        parser=_step_seconds, metavar="MS", help="Time of a draft step in ms.", show_default=False
    ),
]
VerifyMs = Annotated[
    StepSeconds | None,
    typer.Option(
        parser=_step_seconds,
        metavar="MS",
        help="Time of a verify pass in ms, or by number of tokens 1:8,4:8.5,16:10.",
        show_default=False,
    ),
]
Acceptance = Annotated[
    Shares | None,
    typer.Option(
        parser=_acceptance,
        metavar="SHARE",
        help="Share of right draft tokens, or by place in a run 0.7,0.8,0.85.",
        show_default=False,
    ),
]
RoundTrip = Annotated[
    float,
    typer.Option(
        callback=_milliseconds,
        help="Round-trip time in ms from the orchestrator to either service.",
    ),
]
DraftRoundTrip = Annotated[
    float | None,
    typer.Option(
        callback=_milliseconds, help="That to the draft service.", show_default="as --rtt"
    ),
]
VerifyRoundTrip = Annotated[
    float | None,
    typer.Option(
        callback=_milliseconds, help="That to the verify service.", show_default="as --rtt"
    ),
]
MessageMs = Annotated[
    float,
    typer.Option(callback=_milliseconds, help="Work of the services for each message, in ms."),
]
BranchChance = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="Chance that the right token is a next-best one of the draft where the draft's own "
        "is wrong; 0: no branches.",
    ),
]
