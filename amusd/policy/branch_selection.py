"""Which branch is worth drafting next. Pure.

A branch is for one outcome of a pass: the run is right up to a position, and there the verify model
writes one of the draft's next-best tokens. Its next token is of use if that outcome comes, and all
tokens before it are right. The branch whose next token is likeliest of use is drafted first. So
how many branches there are, and how deep they are, follows from one comparison.
"""

import heapq
import math
from dataclasses import dataclass, field

_PRIOR_WEIGHT = 4.0
_RANK_DECAY = 0.5  # before anything is known, each rank is half as likely as the one before
_MIN_ODDS = 0.001  # a token that is used less often is not drafted


@dataclass(slots=True)
class RankOdds:
    """How often each next-best token of the draft was the right one, where its choice was wrong."""

    _num_rejected: float = _PRIOR_WEIGHT
    _num_right: list[float] = field(default_factory=list)

    def rejected(self, rank: int | None) -> None:
        """Count a rejection in favor of the token of this rank, from 0; None: of none of them."""
        self._num_rejected += 1
        if rank is not None:
            self._extend(rank + 1)
            self._num_right[rank] += 1

    def chance(self, rank: int) -> float:
        """Return the probability that a rejection is in favor of this rank, 0 to 1."""
        self._extend(rank + 1)
        return self._num_right[rank] / self._num_rejected

    def _extend(self, num_ranks: int) -> None:
        while len(self._num_right) < num_ranks:
            self._num_right.append(_PRIOR_WEIGHT * _RANK_DECAY ** (len(self._num_right) + 1))


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """A branch with its next token to draft; the one that is likeliest of use comes first.

    ``cost`` is the negative logarithm of the probability that the token is used, given that the run
    is right before position 0. Costs of one epoch can be compared, also after further tokens became
    final. The branch has ``depth`` tokens so far.
    """

    cost: float
    position: int
    token: int
    depth: int = 0


class BranchSelection:
    """The branches of one epoch that are not drafted at the moment."""

    def __init__(self) -> None:
        """Start without any."""
        self.odds = RankOdds()
        self._candidates: list[Candidate] = []
        self._token_cost = -math.log(0.75)

    def restart(self, acceptance: float) -> None:
        """Forget all branches: another epoch begins, with this acceptance, 0 to 1."""
        self._candidates.clear()
        self._token_cost = -math.log(min(max(acceptance, 0.05), 0.99))

    def add(self, position: int, alternatives: tuple[int, ...]) -> None:
        """Take the next-best tokens beside the one that the run has at ``position``."""
        for rank, token in enumerate(alternatives):
            cost = position * self._token_cost - math.log(self.odds.chance(rank))
            heapq.heappush(self._candidates, Candidate(cost, position, token))

    def next_of(self, branch: Candidate) -> Candidate:
        """Return a branch that has one token more."""
        cost = branch.cost + self._token_cost
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
        rejected = -math.log(max(1e-3, 1.0 - math.exp(-self._token_cost)))
        return branch.cost - verified * self._token_cost + rejected < -math.log(_MIN_ODDS)
