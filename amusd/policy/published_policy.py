"""The speculation policy of the AMUSD paper (arXiv 2410.17375), as its code has it.

It is there to compare with. The draft runs ahead as far as the session was opened for, and sends
each token in a proposal of its own. The verify model checks what is there as soon as a pass ends.
After a rejection it waits until the draft has acknowledged the rollback and has drafted two fresh
tokens. The first proposal of the new epoch is the acknowledgement.
"""

from amusd.protocol.events import Proposal, Verdict

_NUM_FRESH_TOKENS = 2


class Published:
    """Wait for two fresh tokens after a rejection, else for one; learn nothing."""

    max_checked = 0
    lookahead = 0
    tokens_per_proposal = 0

    def __init__(
        self, draft_timeout_seconds: float, num_fresh: int = _NUM_FRESH_TOKENS, num_least: int = 1
    ) -> None:
        """Wait for a proposal for at most ``draft_timeout_seconds``.

        A pass after a rejection checks at least ``num_fresh`` proposals, any other ``num_least``.
        """
        self._draft_timeout_seconds = draft_timeout_seconds
        self._num_fresh = num_fresh
        self._num_least = num_least
        self._is_refilling = False

    def first_proposal(self, now_seconds: float) -> int:
        """Return 0: all proposals have the same size."""
        return 0

    def start_size(self, num_ready: int, now_seconds: float) -> int:
        """Start with all that is ready if it is enough."""
        least = self._num_fresh if self._is_refilling else self._num_least
        return max(least, num_ready)

    def draft_wait_seconds(self) -> float:
        """Return the draft timeout: the verify model never goes on alone before."""
        return self._draft_timeout_seconds

    def draft_wait_expired(self) -> None:
        """Nothing to learn: after the draft timeout the session gives the draft up."""

    def proposed(self, proposal: Proposal, now_seconds: float) -> None:
        """Nothing to learn."""

    def rolled_back(self, epoch: int, now_seconds: float) -> None:
        """Wait for fresh tokens before the next pass."""
        self._is_refilling = True

    def passed(self, verdict: Verdict, is_first: bool) -> None:
        """Start the next pass as usual, unless a rollback follows."""
        self._is_refilling = False
