"""The decoding strategies: what each asks of the draft, and when the verify model goes on alone.

They differ in these few numbers only; ledger, services and messages are the same for all.
"""

import enum
from dataclasses import dataclass
from typing import ClassVar


class Strategy(enum.Enum):
    """How a request is decoded. All strategies give the same tokens."""

    AUTOREGRESSIVE = "autoregressive"
    SPECULATIVE = "speculative"
    AMUSD = "amusd"


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """What a strategy asks of the draft service.

    ``tokens_per_proposal == lookahead`` makes draft and verify take turns: the draft stops
    after its look-ahead, and nothing is there to check before all of it has come.
    """

    lookahead: int
    tokens_per_proposal: int


def draft_plan(strategy: Strategy, lookahead: int) -> DraftPlan | None:
    """Return what ``strategy`` asks of the draft; None if it drafts nothing."""
    match strategy:
        case Strategy.AUTOREGRESSIVE:
            return None
        case Strategy.SPECULATIVE:
            return DraftPlan(lookahead, tokens_per_proposal=lookahead)
        case Strategy.AMUSD:
            return DraftPlan(lookahead, tokens_per_proposal=1)


@dataclass(slots=True)
class Patience:
    """How long an idle verify model waits for a proposal before it goes on by itself.

    Waiting as long as a pass takes costs at most twice what the best choice would have cost
    (the ski-rental argument); in lock-step the draft's turn is waited for, within reason.
    """

    strategy: Strategy
    draft_timeout_seconds: float
    last_pass_seconds: float | None = None

    MIN_SECONDS: ClassVar[float] = 0.002

    def seconds(self) -> float:
        """Return the longest wait for a proposal."""
        if self.strategy is not Strategy.AMUSD or self.last_pass_seconds is None:
            return self.draft_timeout_seconds
        return min(max(self.last_pass_seconds, self.MIN_SECONDS), self.draft_timeout_seconds)
