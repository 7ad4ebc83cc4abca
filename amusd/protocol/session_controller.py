"""Conducts one session: ledger, pace and end of output together turn events into decisions.

Rules of this file
- It decides; whoever calls it carries the decisions out, in the order of their fields.
- It has no clock: every event comes with the time, in seconds of one monotonic clock.
- Tokens come from the ledger alone; the pace only says when a pass starts, and over how much.
"""

import dataclasses
from typing import TypeVar

from amusd.policy.speculation_policy import SpeculationPolicy
from amusd.protocol.events import NOTHING, Advance, Decision, Forward, Proposal, Rollback, Verdict
from amusd.protocol.finish import FinishReason, FinishRule
from amusd.protocol.ledger import Ledger

Message = TypeVar("Message", Advance, Rollback)


class SessionController:
    """Decides what follows from each event of a session, until its output is over."""

    def __init__(
        self, ledger: Ledger, pace: SpeculationPolicy, finish: FinishRule, has_draft: bool
    ) -> None:
        """Start with the pass that reads the prompt, which nobody has to ask for."""
        self.ledger = ledger
        self.num_output = 0
        self.finish_reason: FinishReason | None = None
        self._policy = pace
        self._finish = finish
        self._has_draft = has_draft
        # Whether a verdict is to come without our asking for it.
        self._pass_due = True
        # Proposals that wait for more of them while the verify model is idle.
        self._held: Forward | None = None

    @property
    def pass_due(self) -> bool:
        """Whether a verdict is to come; if not, the verify model waits for us."""
        return self._pass_due

    def draft_wait_seconds(self) -> float:
        """Return how long the verify model should wait for a proposal."""
        return self._policy.draft_wait_seconds()

    def on_verdict(self, verdict: Verdict, now_seconds: float) -> Decision:
        """Take the outcome of a pass.

        Raises:
            PreconditionError: the verify service breaks the protocol; nothing has changed.
        """
        decision = self.ledger.verdict(verdict)
        if decision is NOTHING:
            return decision
        self._policy.passed(verdict, is_first=self.ledger.counts.passes == 1)
        # What is left of the tail is with the verify service already.
        self._pass_due = self.ledger.num_speculated > 0
        decision = self._cut(self._to_draft(decision, now_seconds))
        if self._pass_due or self.finish_reason is not None:
            return decision
        if not self._has_draft:
            # One pass is asked for ahead, so that the verify model need not wait for us.
            return self._forwarding(decision, self.ledger.unspeculated_pass(num_ahead=1))
        if self._policy.start_size(0, now_seconds) == 0:
            return self._forwarding(decision, self.ledger.unspeculated_pass())
        return decision

    def on_proposal(self, proposal: Proposal, now_seconds: float) -> Decision:
        """Take drafted tokens, or word that there are none.

        Raises:
            PreconditionError: the draft service breaks the protocol; no token has changed.
        """
        self._policy.proposed(proposal, now_seconds)
        decision = self._to_draft(self.ledger.proposal(proposal), now_seconds)
        nothing_to_propose = (
            not proposal.tokens
            and proposal.epoch == self.ledger.epoch
            and proposal.position >= self.ledger.verified_position
        )
        if nothing_to_propose and not self._pass_due:
            return self._go_on()
        if decision.forward is None or self._holds(decision.forward, now_seconds):
            return dataclasses.replace(decision, forward=None)
        return self._forwarding(decision, decision.forward)

    def on_draft_wait_over(self) -> Decision:
        """Let the verify model go on, for no proposal has come in time."""
        self._policy.draft_wait_expired()
        return self._go_on()

    def on_draft_lost(self) -> Decision:
        """Go on without a draft: an empty tail is plain decoding."""
        self._has_draft = False
        return NOTHING if self._pass_due else self._go_on()

    def on_verify_moved(self) -> Decision:
        """Go on with another verify service, opened with the final tokens and the epoch.

        It starts with a pass that nobody has to ask for, and gets the whole tail again.
        """
        self._pass_due = True
        self._held = None  # part of the tail
        tail = self.ledger.tail
        return NOTHING if tail is None else self._forwarding(NOTHING, tail)

    def _go_on(self) -> Decision:
        """Let the verify model go on with what there is, if only by itself."""
        return self._forwarding(NOTHING, self.ledger.unspeculated_pass())

    def _to_draft(self, decision: Decision, now_seconds: float) -> Decision:
        """Let the draft run ahead as far as it is of use; a lost draft is told nothing."""
        if not self._has_draft:
            return dataclasses.replace(decision, rollback=None, advance=None)
        if decision.rollback is not None:
            self._policy.rolled_back(decision.rollback.epoch, now_seconds)
        return dataclasses.replace(
            decision,
            rollback=self._bounded(decision.rollback),
            advance=self._bounded(decision.advance),
        )

    def _bounded(self, message: Message | None) -> Message | None:
        if message is None:
            return None
        return dataclasses.replace(message, lookahead=self._policy.lookahead)

    def _cut(self, decision: Decision) -> Decision:
        """Keep the tokens that belong to the output."""
        tokens, self.finish_reason = self._finish.cut(decision.committed, self.num_output)
        self.num_output += len(tokens)
        return dataclasses.replace(decision, committed=tokens)

    def _holds(self, forward: Forward, now_seconds: float) -> bool:
        """Collect proposals while the verify model is idle and more of them pay."""
        if self._pass_due:
            return False
        held = self._joined(forward)
        # The last token of an output needs no proposal.
        room = self._finish.max_tokens - self.num_output - 1
        num_ready = len(held.tokens)
        if num_ready >= min(room, self._policy.start_size(num_ready, now_seconds)):
            return False
        self._held = held
        return True

    def _joined(self, forward: Forward) -> Forward:
        """Return what was held back, with ``forward`` behind it."""
        if self._held is None:
            return forward
        return dataclasses.replace(self._held, tokens=self._held.tokens + forward.tokens)

    def _forwarding(self, decision: Decision, forward: Forward) -> Decision:
        """Send ``forward`` and what was held back; a plain pass is none if there is some."""
        forward = dataclasses.replace(self._joined(forward), max_checked=self._policy.max_checked)
        self._held = None
        self._pass_due = True
        return dataclasses.replace(decision, forward=forward)
