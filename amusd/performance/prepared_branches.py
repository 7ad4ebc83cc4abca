"""Branches of one simulated draft session: each step adds a token to the likeliest ones."""

from dataclasses import dataclass, field

from amusd.performance.agreement import Agreement
from amusd.performance.deployment import Deployment
from amusd.protocol.draft_session import DraftSession
from amusd.protocol.events import Branch


@dataclass(slots=True)
class _Row:
    """A branch that is being drafted."""

    position: int
    token: int
    tokens: list[int] = field(default_factory=list)


class PreparedBranches:
    """Up to ``num_rows`` branches at a time, those whose outcome is likeliest first."""

    def __init__(self, deployment: Deployment, session: DraftSession, agreement: Agreement) -> None:
        """Draft branches beside ``session``."""
        assert deployment.branching is not None
        self._deployment = deployment
        self._branching = deployment.branching
        self._session = session
        self._agreement = agreement
        self._rows: list[_Row] = []
        # By position: the next-best tokens that have no branch yet, and the place in the run.
        self._open: dict[int, tuple[list[int], int]] = {}

    def wrote(self, position: int, place: int) -> None:
        """Take the next-best tokens beside the run's token at ``position``."""
        self._open[position] = (list(self._agreement.next_best(position, place)), place)

    def begin(self) -> int:
        """Choose the branches of the next step; return how many there are."""
        verified = self._session.verified_position
        if self._session.is_stalled:
            self._open.clear()
        self._open = {at: one for at, one in self._open.items() if at >= verified}
        self._rows = [row for row in self._rows if row.position >= verified]
        while len(self._rows) < self._branching.num_rows and (row := self._next_row()) is not None:
            self._rows.append(row)
        return len(self._rows)

    def end(self) -> None:
        """Add a token to each branch of the step, and hand over those that are deep enough."""
        for row in self._rows:
            place = len(row.tokens)
            token = self._agreement.draft_token(row.position + 1 + place, place)
            row.tokens.append(token)
            if len(row.tokens) >= self._depth_at(row.position):
                self._hand_over(row)
        self._rows = [row for row in self._rows if len(row.tokens) < self._depth_at(row.position)]

    def before_rollback(self, position: int, token: int) -> None:
        """Keep what is drafted for the outcome, and end all other branches."""
        for row in self._rows:
            if (row.position, row.token) == (position, token) and row.tokens:
                self._hand_over(row)
        self._rows.clear()
        self._open.clear()

    def _next_row(self) -> _Row | None:
        """Return the branch that is worth most; None: all have been begun."""
        best, best_worth = None, 0.0
        chance, last = 1.0, self._session.verified_position
        for position in sorted(self._open):
            tokens, place = self._open[position]
            right = self._deployment.acceptance_at(place)
            for _ in range(last, position):
                chance *= right
            last = position
            if not tokens or not self._depth_at(position):
                continue
            chances = self._branching.chances
            worth = chance * (1.0 - right) * chances[len(chances) - len(tokens)]
            if worth > best_worth:
                best, best_worth = position, worth
        if best is None:
            return None
        return _Row(best, self._open[best][0].pop(0))

    def _depth_at(self, position: int) -> int:
        return min(self._branching.depth, self._session.branch_room(position))

    def _hand_over(self, row: _Row) -> None:
        self._session.branch(Branch(row.position, row.token, tuple(row.tokens)))
