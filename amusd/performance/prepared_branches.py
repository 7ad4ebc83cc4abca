"""Branches of one simulated draft session, planned as in the draft service."""

from amusd.performance.agreement import Agreement
from amusd.performance.deployment import Deployment
from amusd.policy.branch_plan import BranchCounts, BranchPlan
from amusd.policy.branch_selection import Candidate, Choice
from amusd.protocol.draft_session import DraftSession


class PreparedBranches:
    """Up to ``num_rows`` branches at a time."""

    def __init__(self, deployment: Deployment, session: DraftSession, agreement: Agreement) -> None:
        """Draft branches beside ``session``."""
        assert deployment.branching is not None
        self._deployment = deployment
        self._branching = deployment.branching
        self._session = session
        self._agreement = agreement
        self.plan = BranchPlan(session, BranchCounts())
        self._rows: list[Candidate] = []

    def wrote(self, position: int, place: int) -> None:
        """Take what could have been written at ``position``, at this place of the run."""
        self.plan.wrote(position, self._choice(position, place))

    def begin(self) -> int:
        """Choose the branches of the next step; return how many there are."""
        if self._session.is_stalled:
            self._rows.clear()
            return 0
        self.plan.num_unsent_steps += 1
        self._rows = [row for row in self._rows if self.plan.goes_on(row)]
        while len(self._rows) < self._branching.num_rows:
            row = self.plan.next_branch()
            if row is None:
                break
            self._rows.append(row)
        return len(self._rows)

    def end(self) -> None:
        """Add a token to each branch of the step."""
        self._rows = [self._grown(row) for row in self._rows]

    def before_rollback(self, position: int, token: int) -> None:
        """End all branches, but give the session what is drafted for this outcome."""
        self._rows.clear()
        self.plan.before_rollback(position, token)

    def _grown(self, row: Candidate) -> Candidate:
        position = row.position + 1 + row.depth
        token = self._agreement.draft_token(position, row.depth)
        return self.plan.grew(row, token, self._choice(position, row.depth))

    def _choice(self, position: int, place: int) -> Choice:
        right = self._deployment.acceptance_at(place)
        others = ((1.0 - right) * chance for chance in self._branching.chances)
        return Choice(self._agreement.next_best(position, place), (right, *others))
