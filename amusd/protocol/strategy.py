"""The decoding strategies, and what each asks of the draft.

They differ in these two numbers and in their speculation policy only
(``amusd.policy.speculation_policy``). Ledger, services and messages are the same for all.
"""

import enum
from dataclasses import dataclass


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
