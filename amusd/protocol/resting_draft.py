"""A draft that rests: what its session does not tell it until it drafts again.

While speculation is off, the draft gets no message, and stops at its look-ahead. It resumes with at
most one rollback, then one advance with all final tokens since.
"""

from dataclasses import dataclass

from amusd.protocol.events import Advance, Rollback
from amusd.protocol.ledger import Ledger


@dataclass(slots=True)
class RestingDraft:
    """What a draft has missed of one session."""

    _advanced_to: int | None = None  # position of the first final token that it has not been sent
    _rollback: Rollback | None = None  # the first one that it has not been sent

    def miss(self, rollback: Rollback | None, advance: Advance | None) -> None:
        """Keep back messages, in the order in which they are sent."""
        if self._rollback is None and rollback is not None:
            self._rollback = rollback
        elif self._advanced_to is None and advance is not None:
            self._advanced_to = advance.position

    def resume(self, ledger: Ledger) -> tuple[Rollback | None, Advance | None] | None:
        """Return the messages with which the draft drafts again; None: it cannot yet.

        It cannot while proposals that it does not know are in the tail: those of a branch that it
        was not told of.
        """
        rollback = self._rollback
        if rollback is None:
            return None, self._advance(ledger, self._advanced_to)
        if ledger.num_speculated:
            return None
        # A later rollback may be ahead of all that the draft has written. This one is not.
        position = rollback.verified_position
        ledger.draft_begins_at(position)
        resumed = Rollback(ledger.epoch, position, rollback.corrected_token)
        return resumed, self._advance(ledger, position)

    @staticmethod
    def _advance(ledger: Ledger, position: int | None) -> Advance | None:
        if position is None or position >= ledger.verified_position:
            return None
        return Advance(ledger.epoch, position, ledger.tokens[position:])
