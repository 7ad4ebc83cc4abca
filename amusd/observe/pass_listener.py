"""The callback through which a worker reports its passes."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PassReport:
    """A pass or step: its time, and how many tokens of how many sessions it computed.

    ``num_branch_tokens`` of them belong to branches, which took ``branch_seconds`` of the time.
    """

    seconds: float
    num_sessions: int
    num_tokens: int
    num_branch_tokens: int = 0
    branch_seconds: float = 0.0


OnPass = Callable[[PassReport], None]
"""Called after each pass or step."""


def ignore_pass(report: PassReport) -> None:
    """Do nothing; the callback of a worker without metrics."""
