"""The plan of a session: what a request asks for, checked and complete."""

from dataclasses import dataclass

from amusd.protocol.finish import FinishRule
from amusd.protocol.strategy import Strategy


@dataclass(frozen=True, slots=True)
class SessionPlan:
    """What to generate and how: a request that has been checked."""

    session_id: str
    tokens: tuple[int, ...]
    strategy: Strategy
    lookahead: int
    finish: FinishRule
    verify_timeout_seconds: float
    draft_timeout_seconds: float
    replica_timeout_seconds: float = 10.0
    records_timeline: bool = False
    max_branches: int = 0
