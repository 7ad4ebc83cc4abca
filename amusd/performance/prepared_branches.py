"""Branches of one simulated draft session, chosen and sent by the rules of the draft service."""

from dataclasses import dataclass, field

from amusd.performance.agreement import Agreement
from amusd.performance.deployment import Deployment
from amusd.policy.branch_selection import BranchSelection, Candidate, Choice
from amusd.protocol.draft_session import DraftSession
from amusd.protocol.events import Branch

_MIN_GAIN = 0.7  # as in the draft service: a branch gives way to one twice as likely of use


@dataclass(slots=True)
class _Drafted:
    """What is drafted of a branch, and what could have been written at each of its tokens."""

    branch: Candidate
    tokens: list[int] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)


class PreparedBranches:
    """Up to ``num_rows`` branches at a time, the likeliest tokens first."""

    def __init__(self, deployment: Deployment, session: DraftSession, agreement: Agreement) -> None:
        """Draft branches beside ``session``."""
        assert deployment.branching is not None
        self._deployment = deployment
        self._branching = deployment.branching
        self._session = session
        self._agreement = agreement
        self._selection = BranchSelection(session.length)
        self._rows: list[Candidate] = []
        self._drafted: dict[tuple[int, int], _Drafted] = {}
        self._grown: dict[tuple[int, int], _Drafted] = {}
        self._taken: _Drafted | None = None
        self.num_unsent_steps = 0
        """Steps since the session sent a message."""

    @property
    def is_overdue(self) -> bool:
        """Whether tokens of branches are sent without a run."""
        return bool(self._grown) and self.num_unsent_steps >= self._session.tokens_per_proposal

    def wrote(self, position: int, place: int) -> None:
        """Take what could have been written at ``position``, at this place of the run."""
        self._selection.add(position, self._choice(position, place))

    def begin(self) -> int:
        """Choose the branches of the next step; return how many there are."""
        verified = self._session.verified_position
        if self._session.is_stalled:
            self._rows.clear()
            return 0
        self.num_unsent_steps += 1
        self._rows = [row for row in self._rows if self._stays(row, verified)]
        while len(self._rows) < self._branching.num_rows:
            best = self._selection.best(verified)
            if best is None or not self._selection.is_worth(best, verified):
                break
            self._selection.take_best()
            if self._session.branch_room(best.position):
                self._drafted.setdefault((best.position, best.token), _Drafted(best))
                self._rows.append(best)
        return len(self._rows)

    def end(self) -> None:
        """Add a token to each branch of the step."""
        rows = []
        for row in self._rows:
            drafted = self._drafted.get((row.position, row.token))
            if drafted is None:
                continue  # its epoch ended while it was drafted
            place = len(drafted.tokens)
            position = row.position + 1 + place
            choice = self._choice(position, place)
            drafted.tokens.append(self._agreement.draft_token(position, place))
            drafted.choices.append(choice)
            self._grown[row.position, row.token] = drafted
            rows.append(self._selection.next_of(row, choice.probabilities[0]))
        self._rows = rows

    def hand_over(self) -> None:
        """Give the session the branches that have grown, to be sent."""
        for drafted in self._grown.values():
            self._hand_over(drafted)
        self._grown.clear()

    def before_rollback(self, position: int, token: int) -> None:
        """End all branches, but give the session what is drafted for this outcome."""
        self._rows.clear()
        self._taken = self._drafted.get((position, token))
        if self._taken is not None:
            self._hand_over(self._taken)

    def after_rollback(self) -> None:
        """Start again, with the next-best tokens beside what the new run begins with."""
        self._drafted.clear()
        self._grown.clear()
        start = self._session.verified_position
        self._selection.restart(start)
        choices = self._taken.choices if self._taken is not None else []
        for position, choice in zip(range(start, self._session.length), choices, strict=False):
            self._selection.add(position, choice)

    def _stays(self, row: Candidate, verified: int) -> bool:
        """Whether a branch keeps its row; one that is worth less waits for its turn."""
        if row.position < verified or row.depth >= self._session.branch_room(row.position):
            return False
        best = self._selection.best(verified)
        if row.depth and best is not None and best.cost < row.cost - _MIN_GAIN:
            self._selection.put_back(row)
            return False
        return True

    def _choice(self, position: int, place: int) -> Choice:
        right = self._deployment.acceptance_at(place)
        others = ((1.0 - right) * chance for chance in self._branching.chances)
        return Choice(self._agreement.next_best(position, place), (right, *others))

    def _hand_over(self, drafted: _Drafted) -> None:
        branch = drafted.branch
        if drafted.tokens:
            self._session.branch(Branch(branch.position, branch.token, tuple(drafted.tokens)))
