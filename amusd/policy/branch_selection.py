"""Which branch is worth drafting next. Pure.

A branch is for one outcome of a pass: the run is right up to a position, and there the verify model
writes one of the draft's next-best tokens. Its next token is of use if that outcome comes, and all
tokens before it are right. The branch whose next token is likeliest of use is drafted first. So
how many branches there are, and how deep they are, follows from one comparison.

All probabilities are the draft model's own. For the embedded pair they are close to the share of
tokens that are right, see docs/decisions.md.
"""

import heapq
import math
from dataclasses import dataclass

_UNKNOWN = 0.75  # probability of a token that the model did not write, such as of n-gram lookup
_LEAST = 1e-6
_MIN_USE = 0.001  # a token that is used less often is not drafted


@dataclass(frozen=True, slots=True)
class Choice:
    """The next-best tokens at a position, best first, and the probabilities of all.

    ``probabilities`` has one more element than ``alternatives``: first that of the token itself.
    """

    alternatives: tuple[int, ...]
    probabilities: tuple[float, ...]

    def without(self, token: int) -> "Choice":
        """Return the choice without one of its alternatives."""
        index = self.alternatives.index(token)
        others, probabilities = list(self.alternatives), list(self.probabilities)
        del others[index], probabilities[index + 1]
        return Choice(tuple(others), tuple(probabilities))


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """A branch with its next token to draft; the one that is likeliest of use comes first.

    ``cost`` is the negative logarithm of the probability that the token is used, given that the run
    is right before the first position of the epoch. So costs of one epoch can be compared, also
    after further tokens became final. The branch has ``depth`` tokens so far.
    """

    cost: float
    position: int
    token: int
    depth: int = 0


class BranchSelection:
    """The branches of one epoch that are not drafted at the moment."""

    def __init__(self, position: int) -> None:
        """Start without any, with a run that begins at ``position``."""
        self._candidates: list[Candidate] = []
        self._start = position
        self._run_costs = [0.0]  # of all tokens of the run before start, start + 1, ...

    def restart(self, position: int) -> None:
        """Forget all branches: the run of another epoch begins at ``position``."""
        self._candidates.clear()
        self._start = position
        self._run_costs = [0.0]

    def add(self, position: int, choice: Choice) -> None:
        """Take what the draft model could have written at ``position`` of the run."""
        before = self._run_cost(position)
        self._run_costs.append(before + _cost(choice.probabilities[0]))
        for token, probability in zip(choice.alternatives, choice.probabilities[1:], strict=True):
            heapq.heappush(
                self._candidates, Candidate(before + _cost(probability), position, token)
            )

    def next_of(self, branch: Candidate, probability: float) -> Candidate:
        """Return a branch that has one token more, of this probability."""
        cost = branch.cost + _cost(probability)
        return Candidate(cost, branch.position, branch.token, branch.depth + 1)

    def put_back(self, branch: Candidate) -> None:
        """Draft a branch further when its turn comes."""
        heapq.heappush(self._candidates, branch)

    def best(self, verified: int) -> Candidate | None:
        """Return the best branch at or behind ``verified``; None: there is none."""
        candidates = self._candidates
        while candidates and candidates[0].position < verified:
            heapq.heappop(candidates)
        return candidates[0] if candidates else None

    def take_best(self) -> Candidate:
        """Remove the best branch, and return it."""
        return heapq.heappop(self._candidates)

    def is_worth(self, branch: Candidate, verified: int) -> bool:
        """Whether the next token of a branch is used often enough to be drafted."""
        return branch.cost - self._run_cost(verified) < _cost(_MIN_USE)

    def _run_cost(self, position: int) -> float:
        """Return the cost of the run before ``position``."""
        index = max(0, position - self._start)
        while len(self._run_costs) <= index:
            self._run_costs.append(self._run_costs[-1] + _cost(_UNKNOWN))
        return self._run_costs[index]


def _cost(probability: float) -> float:
    return -math.log(max(probability, _LEAST))
