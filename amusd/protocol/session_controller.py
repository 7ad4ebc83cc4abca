"""The controller of one session: from each event to what has to be sent.

Rules of this file
- It decides. The caller carries the decisions out.
- It has no clock: every event comes with the time, in seconds of one monotonic clock.
- Tokens come from the ledger alone. The speculation policy only says when a pass starts, and how
  many proposals it checks.
- While the speculation switch is off, the draft rests: it gets no message until it is on again.
- On a device with other sessions, passes are asked for ahead of time: a session that waits for its
  draft would miss a pass that the others start.
"""

from dataclasses import replace

from amusd.policy.speculation_policy import SpeculationPolicy
from amusd.policy.speculation_switch import SwitchMember
from amusd.protocol.draft_probabilities import padded, trimmed, use_probability
from amusd.protocol.events import NOTHING, Advance, Decision, Forward, Proposal, Rollback, Verdict
from amusd.protocol.finish import FinishReason, FinishRule, TextEnd
from amusd.protocol.ledger import Ledger
from amusd.protocol.resting_draft import RestingDraft

_STOP_MARGIN = 1.001  # probabilities are rounded on their way from the draft
_ASKED_AHEAD = 8  # tokens; passes that a lost client may waste


class SessionController:
    """Decides what follows from each event of a session, until its output is over."""

    def __init__(
        self,
        ledger: Ledger,
        policy: SpeculationPolicy,
        finish: FinishRule,
        has_draft: bool,
        min_use_probability: float = 0.0,
        text_end: TextEnd | None = None,
    ) -> None:
        """Start with the pass over the prompt, which comes without a request.

        The draft stops where a further token is used less often than ``min_use_probability``. The
        output also ends where ``text_end`` says.
        """
        self.ledger = ledger
        self.num_output = 0
        self.finish_reason: FinishReason | None = None
        self.num_unaided_passes = 0
        """Passes in a row that waited for the draft, but it sent nothing."""
        self._policy = policy
        self._finish = finish
        self._text_end = text_end
        self._has_draft = has_draft
        self._min_use_probability = min_use_probability
        self._pass_due = True
        self._computes_prompt = True  # the next verdict includes the prefill
        self._held: Forward | None = None  # waits for more proposals; the verify model is idle
        self._awaited_since: float | None = None  # the draft has nothing in the tail
        self._member: SwitchMember | None = None  # None: the session speculates in any case
        self._rest: RestingDraft | None = None  # None: the draft works
        self.has_rested = False
        """Whether the draft has got no messages for a while."""
        self._asked_until = -1  # position up to which passes come without proposals

    def join(self, member: SwitchMember) -> None:
        """Follow the speculation switch of the verify device from now on."""
        self._member = member
        if self._has_draft and not member.speculates and self._rest is None:
            self._begin_rest()

    @property
    def draft_rests(self) -> bool:
        """Whether the draft gets no messages now."""
        return self._rest is not None

    @property
    def pass_due(self) -> bool:
        """Whether a verdict is to come. If not, the verify model waits for this session."""
        return self._pass_due

    def draft_wait_seconds(self) -> float:
        """Return how long the verify model should wait for a proposal."""
        return self._policy.draft_wait_seconds()

    def draft_silence_seconds(self, now_seconds: float) -> float:
        """Return for how long the draft has sent nothing while its proposals were missing."""
        return 0.0 if self._awaited_since is None else now_seconds - self._awaited_since

    def on_verdict(self, verdict: Verdict, now_seconds: float) -> Decision:
        """Take the outcome of a pass.

        Raises:
            PreconditionError: the verify service breaks the protocol; nothing has changed.
        """
        within, finish_reason = self._within_output(verdict)
        decision = self.ledger.verdict(within)
        if decision is NOTHING:
            return decision
        self._policy.passed(verdict, is_first=self._computes_prompt)
        if self._member is not None and self._has_draft:
            num_tokens = len(decision.committed)
            self._member.passed(verdict, num_tokens, now_seconds, self._computes_prompt)
        self._computes_prompt = False
        # What is left of the tail is with the verify service already, and so is what was asked for.
        has_tail = self.ledger.num_speculated > 0
        self._pass_due = has_tail or self.ledger.verified_position <= self._asked_until
        committed = decision.committed
        self.num_output += len(committed)
        self.finish_reason = finish_reason
        # When the next pass starts depends on when the draft is back.
        decision = self._to_draft(decision, now_seconds)
        if self._has_draft and self._rest is None and not has_tail:
            self._await_draft(now_seconds)
        forward = None
        if self.finish_reason is None:
            forward = self._after_verdict(now_seconds)
        return Decision(decision.rollback, decision.advance, forward, committed)

    def on_proposal(self, proposal: Proposal, now_seconds: float) -> Decision:
        """Take drafted tokens, or the message that there are none.

        Raises:
            PreconditionError: the draft service breaks the protocol; no token has changed.
        """
        decision = self._take_proposal(proposal, now_seconds)
        # An old or late proposal shows that the draft lives, but the next one is still awaited.
        self._awaited_since, self.num_unaided_passes = None, 0
        if not self._pass_due and self.ledger.num_speculated == 0:
            self._awaited_since = now_seconds
        return self._kept_back(decision) if self._rest is not None else decision

    def _to_draft(self, decision: Decision, now_seconds: float) -> Decision:
        """Return a decision on a verdict with the messages that the draft gets."""
        if self._member is not None and self._has_draft:
            speculates = self._member.speculates
            if self._rest is None and not speculates:
                self._begin_rest()
            if self._rest is not None:
                decision = self._kept_back(decision)
                resumed = self._rest.resume(self.ledger) if speculates else None
                if resumed is not None:
                    self._rest = None
                    decision = Decision(*resumed)
        return Decision(
            self._rollback(decision.rollback, now_seconds), self._advance(decision.advance)
        )

    def _begin_rest(self) -> None:
        self._rest, self._awaited_since, self.has_rested = RestingDraft(), None, True

    def _kept_back(self, decision: Decision) -> Decision:
        """Return a decision without the messages to a draft that rests."""
        assert self._rest is not None  # the caller has looked
        self._rest.miss(decision.rollback, decision.advance)
        return Decision(forward=decision.forward)

    def _await_draft(self, now_seconds: float) -> None:
        """Note that the verify model has had nothing to check, although it waited for the draft."""
        if self._awaited_since is None:
            self._awaited_since = now_seconds
        elif self._member is None or self._member.is_alone:
            self.num_unaided_passes += 1

    def _take_proposal(self, proposal: Proposal, now_seconds: float) -> Decision:
        self._policy.proposed(proposal, now_seconds)
        decision = self.ledger.proposal(proposal)
        if decision is NOTHING:
            return self._forward_alone() if self._must_go_on(proposal) else decision
        forward = decision.forward
        if forward is not None:
            forward = None if self._holds(forward, now_seconds) else self._forward(forward)
        return Decision(
            self._rollback(decision.rollback, now_seconds),
            self._advance(decision.advance),
            forward,
        )

    def on_draft_wait_over(self) -> Decision:
        """Let the verify model go on, because no proposal has come in time."""
        self._policy.draft_wait_expired()
        return self._forward_alone()

    def on_draft_moved(self, now_seconds: float) -> None:
        """Wait for the proposals of another draft service, opened with the final tokens."""
        if self._awaited_since is not None:
            self._awaited_since = now_seconds
        if self._rest is not None:
            self._rest = RestingDraft()

    def on_draft_lost(self) -> Decision:
        """Go on without a draft: an empty tail is autoregressive decoding."""
        self._has_draft = False
        self._awaited_since = self._rest = None
        return NOTHING if self._pass_due else self._forward_alone()

    def on_verify_moved(self) -> Decision:
        """Go on with another verify service, opened with the final tokens and the epoch.

        It starts with a pass that comes without a request, and gets the whole tail again.
        """
        self._pass_due = self._computes_prompt = True
        self._held = None  # part of the tail
        self._asked_until = -1
        tail = self.ledger.tail
        return NOTHING if tail is None else Decision(forward=self._forward(tail))

    def _after_verdict(self, now_seconds: float) -> Forward | None:
        """Return the pass to ask for after a verdict; None: wait for proposals."""
        member = self._member
        if member is not None and self._has_draft and (self._rest or not member.is_alone):
            return self._ask_ahead()
        if self._pass_due:
            return None
        if not self._has_draft:
            # One pass is requested ahead, so that the verify model need not wait for the request.
            return self._forward(self.ledger.unspeculated_pass(num_ahead=1))
        if self._policy.start_size(0, now_seconds) == 0:
            return self._forward(self.ledger.unspeculated_pass())
        return None

    def _ask_ahead(self) -> Forward | None:
        """Ask for passes as they come, with the proposals that are there; None: enough are."""
        self._pass_due = True
        most_checked = 0 if self._rest is not None else self._policy.max_checked
        # The next pass runs before this request arrives.
        needed = most_checked + 1
        if self.ledger.verified_position + needed <= self._asked_until:
            return None
        self._asked_until = self.ledger.verified_position + needed + _ASKED_AHEAD
        return self._forward(self.ledger.unspeculated_pass(needed + _ASKED_AHEAD))

    def _must_go_on(self, proposal: Proposal) -> bool:
        """Whether the verify model waits for a draft that has nothing to propose."""
        return (
            not proposal.tokens
            and not proposal.branches
            and not self._pass_due
            and proposal.epoch == self.ledger.epoch
            and proposal.position >= self.ledger.verified_position
        )

    def _rollback(self, rollback: Rollback | None, now_seconds: float) -> Rollback | None:
        """Bound the draft's look-ahead; a lost draft is not rolled back."""
        if rollback is None or not self._has_draft:
            return None
        self._policy.rolled_back(rollback.epoch, now_seconds)
        return Rollback(
            rollback.epoch,
            rollback.verified_position,
            rollback.corrected_token,
            self._policy.lookahead,
            self._policy.tokens_per_proposal,
            self._policy.first_proposal(now_seconds),
            rollback.branch_tokens,
        )

    def _advance(self, advance: Advance | None) -> Advance | None:
        """Bound the draft's look-ahead; a lost draft is not advanced."""
        if advance is None or not self._has_draft:
            return None
        return Advance(
            advance.epoch,
            advance.position,
            advance.tokens,
            self._policy.lookahead,
            self._policy.tokens_per_proposal,
        )

    def _within_output(self, verdict: Verdict) -> tuple[Verdict, FinishReason | None]:
        """Return the verdict without the tokens that the output does not hold, and why it ends.

        They are wasted, not accepted: the output ends before them.
        """
        tokens = self.ledger.committed_by(verdict)
        if not tokens:
            return verdict, None
        tokens, reason = self._finish.cut(tokens, self.num_output)
        num_found = self._text_end.find_end(tokens) if self._text_end is not None else None
        if num_found is not None:
            tokens, reason = tokens[:num_found], FinishReason.STOP
        if reason is None:
            return verdict, None
        return replace(verdict, num_accepted=len(tokens) - 1, next_token=tokens[-1]), reason

    def _holds(self, forward: Forward, now_seconds: float) -> bool:
        """Hold proposals back if the verify model is idle and more of them pay."""
        if self._pass_due:
            return False
        held = self._joined(forward)
        if use_probability(held.probabilities) < _STOP_MARGIN * self._min_use_probability:
            return False
        # The last token of an output needs no proposal.
        room = self._finish.max_tokens - self.num_output - 1
        num_ready = len(held.tokens)
        if num_ready >= min(room, self._policy.start_size(num_ready, now_seconds)):
            return False
        self._held = held
        return True

    def _joined(self, forward: Forward) -> Forward:
        """Return the held proposals with ``forward`` behind them."""
        held = self._held
        if held is None:
            return forward
        branches = held.branches + forward.branches
        return Forward(
            held.epoch,
            held.position,
            held.tokens + forward.tokens,
            branches=branches,
            probabilities=trimmed(
                padded(held.tokens, held.probabilities)
                + padded(forward.tokens, forward.probabilities)
            ),
        )

    def _forward_alone(self) -> Decision:
        """Let the verify model go on with the held proposals, or without any."""
        return Decision(forward=self._forward(self.ledger.unspeculated_pass()))

    def _forward(self, forward: Forward) -> Forward:
        """Return ``forward`` behind the held proposals, for the next pass."""
        joined = self._joined(forward)
        self._held = None
        self._pass_due = True
        return Forward(
            joined.epoch,
            joined.position,
            joined.tokens,
            self._policy.max_checked,
            joined.branches,
            joined.probabilities,
        )
