"""The plan of a session: what a request asks for, checked and complete."""

from dataclasses import dataclass

from amusd.policy.speculation_policy import AsynchronousPolicy
from amusd.protocol.draft_probabilities import MIN_USE_PROBABILITY
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
    policy: AsynchronousPolicy = AsynchronousPolicy.ADAPTIVE

    @property
    def may_rest(self) -> bool:
        """Whether the session may decode without proposals while that is faster."""
        return self.strategy is Strategy.AMUSD and self.policy is AsynchronousPolicy.ADAPTIVE

    @property
    def min_use_probability(self) -> float:
        """Where the draft stops, by its own probabilities; 0: at its look-ahead only."""
        return MIN_USE_PROBABILITY if self.may_rest else 0.0
