"""Laws between draft and ledger, checked at every event that the ledger takes."""

from collections import Counter
from dataclasses import replace

from amusd.protocol.draft_source import DraftSource
from amusd.protocol.events import Advance, Decision, Proposal, Rollback
from amusd.protocol.ledger import Ledger


class Watch:
    """Remembers what the draft wrote in the current epoch, and compares it with what is final."""

    def __init__(self, ledger: Ledger, lookahead: int) -> None:
        self.num_stale = 0
        self.num_late_mismatches = 0
        self._ledger = ledger
        self._lookahead = lookahead
        self._drafted: dict[int, int] = {}
        self._sources: dict[int, DraftSource] = {}
        self.num_proposed_by: Counter[DraftSource] = Counter()
        self.num_right: Counter[DraftSource] = Counter()
        self.num_wrong: Counter[DraftSource] = Counter()

    def before_proposal(self, proposal: Proposal) -> None:
        """The draft stays within its look-ahead: it knows of no more final tokens than we do."""
        end = proposal.position + len(proposal.tokens)
        if proposal.tokens:
            assert end <= self._ledger.verified_position + self._lookahead, "ran too far ahead"
        self.num_proposed_by[proposal.source] += len(proposal.tokens)
        if proposal.epoch == self._ledger.epoch:
            for position, token in enumerate(proposal.tokens, proposal.position):
                self._drafted[position] = token
                self._sources[position] = proposal.source
        else:
            self.num_stale += 1

    def after_proposal(self, decision: Decision) -> None:
        """The same law holds for tokens that come late."""
        self.num_late_mismatches += decision.rollback is not None
        self.after(decision)

    def after(self, decision: Decision) -> None:
        """A mismatch is noticed in the very event that brings its second half."""
        final = self._ledger.tokens
        seen = sorted(position for position in self._drafted if position < len(final))
        wrong = [position for position in seen if self._drafted[position] != final[position]]
        right = [position for position in seen if not wrong or position < wrong[0]]
        self.num_right.update(self._sources[position] for position in right)
        if not wrong:
            assert decision.rollback is None, "rolled back without a reason"
            for position in seen:
                del self._drafted[position]
            return
        first = wrong[0]
        self.num_wrong[self._sources[first]] += 1
        epoch = self._ledger.epoch
        # This law does not say how far the draft runs ahead, or how many tokens it collects.
        rollback = decision.rollback and replace(
            decision.rollback, lookahead=0, tokens_per_proposal=0, first_proposal=0
        )
        assert rollback == Rollback(epoch, first + 1, final[first]), "missed a mismatch"
        rest = final[first + 1 :]
        advance = decision.advance and replace(decision.advance, lookahead=0, tokens_per_proposal=0)
        assert advance == (Advance(epoch, first + 1, rest) if rest else None)
        self._drafted.clear()
