"""The branches of one draft session: which are drafted, and when their tokens are sent. Pure.

The next token to draft is the one that is likeliest of use, of all branches. A branch that has to
give way to another one is drafted further when its turn comes. Every token of a branch can be used
at once: by the verify service if it was sent, and else by the session after the rollback.
"""

from dataclasses import dataclass, field

from amusd.policy.branch_selection import BranchSelection, Candidate, Choice
from amusd.protocol.draft_probabilities import trimmed
from amusd.protocol.draft_session import DraftSession
from amusd.protocol.events import Branch

_MIN_GAIN = 0.7  # a branch gives way to one that is likelier of use by this factor, exp(0.7) = 2


@dataclass(slots=True)
class BranchCounts:
    """Branches and their tokens that were drafted, and rollbacks that found one."""

    prepared: int = 0
    tokens: int = 0
    rollback_hits: int = 0


@dataclass(slots=True)
class _Drafted:
    """What is drafted of a branch, and what could have been written at each of its tokens."""

    branch: Candidate
    tokens: list[int] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)


class BranchPlan:
    """What is drafted beside the run of ``session`` in this epoch."""

    def __init__(self, session: DraftSession, counts: BranchCounts) -> None:
        """Plan branches of ``session``, and add to ``counts``."""
        self.num_unsent_steps = 0
        """Steps with branches since branches were handed over."""
        self.steps_between = 1
        """Least number of steps between two messages with branches."""
        self._session = session
        self._counts = counts
        self._selection = BranchSelection(session.length)
        self._drafted: dict[tuple[int, int], _Drafted] = {}  # by outcome
        self._grown: dict[tuple[int, int], _Drafted] = {}  # those that the session does not know
        self._taken: _Drafted | None = None  # by the rollback that is under way

    @property
    def is_overdue(self) -> bool:
        """Whether tokens of branches should be sent, although no run is ready."""
        return self._is_ready and self.num_unsent_steps >= self._session.tokens_per_proposal

    @property
    def _is_ready(self) -> bool:
        """Whether tokens of branches should go with the next proposal of the run.

        A message for each token would cost more than it gains, as with the tokens of a run.
        """
        return bool(self._grown) and self.num_unsent_steps >= self.steps_between

    def wrote(self, position: int, choice: Choice) -> None:
        """Take what the model could have written at ``position`` of the session's run."""
        self._selection.add(position, choice)

    def next_branch(self) -> Candidate | None:
        """Return the branch to draft next, and count it as begun; None: none is worth it."""
        verified = self._session.verified_position
        while (branch := self._selection.best(verified)) is not None:
            if not self._selection.is_worth(branch, verified):
                return None
            self._selection.take_best()
            if self._session.branch_room(branch.position):
                self._drafted.setdefault((branch.position, branch.token), _Drafted(branch))
                return branch
        return None

    def tokens_of(self, branch: Candidate) -> list[int]:
        """Return what is drafted of a branch of this epoch."""
        return self._drafted[branch.position, branch.token].tokens

    def goes_on(self, branch: Candidate) -> bool:
        """Whether a branch is drafted further now; one that gives way is kept for its turn."""
        verified = self._session.verified_position
        if branch.position < verified or branch.depth >= self._session.branch_room(branch.position):
            return False
        best = self._selection.best(verified)
        if branch.depth and best is not None and best.cost < branch.cost - _MIN_GAIN:
            self._selection.put_back(branch)
            return False
        return True

    def grew(self, branch: Candidate, token: int, choice: Choice) -> Candidate:
        """Take the next token of a branch of this epoch; return the branch with it."""
        root = branch.position, branch.token
        drafted = self._drafted[root]
        self._counts.prepared += not drafted.tokens
        self._counts.tokens += 1
        drafted.tokens.append(token)
        drafted.choices.append(choice)
        self._grown[root] = drafted
        return self._selection.next_of(branch, choice.probabilities[0])

    def hand_over(self) -> None:
        """Give the session the branches that have grown, to be sent."""
        for drafted in self._grown.values():
            self._hand_over(drafted)
        self._grown.clear()
        self.num_unsent_steps = 0

    def hand_over_due(self) -> None:
        """Give the session the branches that go with its next message, if it is time for one."""
        if self.is_overdue or (self._is_ready and self._session.is_run_due):
            self.hand_over()

    def before_rollback(self, position: int, token: int) -> None:
        """Give the session what is drafted for the outcome of a rollback."""
        self._taken = self._drafted.get((position, token))
        if self._taken is not None:
            self._counts.rollback_hits += bool(self._taken.tokens)
            self._hand_over(self._taken)

    def after_rollback(self) -> None:
        """End all branches; start again with the next-best tokens of what the new run begins with.

        Without them, the branches behind a branch would come too late.
        """
        self._drafted.clear()
        self._grown.clear()
        start = self._session.verified_position
        self._selection.restart(start)
        run, taken = self._session.tokens[start:], self._taken
        if taken is None or taken.tokens[: len(run)] != run:
            return  # another source has written the branch that was taken
        for position, choice in enumerate(taken.choices[: len(run)], start):
            self._selection.add(position, choice)

    def _hand_over(self, drafted: _Drafted) -> None:
        branch = drafted.branch
        if drafted.tokens:
            probabilities = trimmed(min(1.0, choice.probabilities[0]) for choice in drafted.choices)
            self._session.branch(
                Branch(
                    branch.position,
                    branch.token,
                    tuple(drafted.tokens),
                    probabilities=probabilities,
                )
            )
