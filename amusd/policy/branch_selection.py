"""Which branch is worth drafting next. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

_ACCEPTANCE = 0.75
_RANK_DECAY = 0.5


@dataclass(frozen=True, slots=True)
class Candidate:
    """A branch that could be drafted: ``distance`` tokens after the verified position.

    ``rank`` counts the tokens that the draft model finds likelier, apart from its choice.
    """

    position: int
    token: int
    distance: int
    rank: int

    @property
    def worth(self) -> float:
        """The probability of its outcome, up to a factor.

        The tokens before it are right, its own is wrong, and the right one has this rank.
        """
        return float(_ACCEPTANCE**self.distance * _RANK_DECAY**self.rank)


def best_candidate(candidates: Iterable[Candidate]) -> Candidate | None:
    """Return the likeliest candidate; None: there is none."""
    return max(candidates, key=lambda one: one.worth, default=None)
