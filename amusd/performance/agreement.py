"""Where the draft agrees with the verify model: a text that both sides of a simulation share.

The verify model always writes ``RIGHT``. The draft writes it where it agrees, else ``WRONG``. So
tokens need no context, and a position has the same outcome in every strategy.
"""

import random
from typing import Protocol

from amusd.performance.deployment import Branching, Deployment

RIGHT, WRONG = 0, 1
_FIRST_OTHER = 2  # tokens from here on are next-best ones that are wrong


class Agreement(Protocol):
    """What the draft model writes at each position of one session's text."""

    def draft_token(self, position: int, place: int) -> int:
        """Return the draft's token at ``place`` of a run, if the tokens before it are right."""

    def next_best(self, position: int, place: int) -> tuple[int, ...]:
        """Return the draft's next-best tokens, the best first; none without branches."""


class RandomAgreement:
    """Right with the acceptance of the place, by one number drawn for each position."""

    def __init__(self, deployment: Deployment, num_tokens: int, seed: int) -> None:
        """Draw the numbers of ``num_tokens`` positions."""
        draws = random.Random(seed)
        self._deployment = deployment
        self._draws = [draws.random() for _ in range(num_tokens)]
        self._ranks = [_rank(deployment.branching, draws.random()) for _ in range(num_tokens)]

    def draft_token(self, position: int, place: int) -> int:
        """Return the draft's token at ``place`` of a run."""
        is_right = self._draws[position] < self._deployment.acceptance_at(place)
        return RIGHT if is_right else WRONG

    def next_best(self, position: int, place: int) -> tuple[int, ...]:
        """Return the draft's next-best tokens, with the right one at its rank if it has one."""
        branching = self._deployment.branching
        if branching is None:
            return ()
        others = list(range(_FIRST_OTHER, _FIRST_OTHER + len(branching.chances)))
        rank = self._ranks[position]
        if rank is not None and self.draft_token(position, place) == WRONG:
            others[rank] = RIGHT
        return tuple(others)


class KnownAgreement:
    """Right except at given positions, as a trace of a real run shows them."""

    def __init__(self, wrong_positions: frozenset[int]) -> None:
        """Disagree at ``wrong_positions`` only."""
        self._wrong_positions = wrong_positions

    def draft_token(self, position: int, place: int) -> int:
        """Return the draft's token, whatever its place."""
        return WRONG if position in self._wrong_positions else RIGHT

    def next_best(self, position: int, place: int) -> tuple[int, ...]:
        """Return none: traces have no next-best tokens."""
        return ()


def _rank(branching: Branching | None, draw: float) -> int | None:
    """Return the rank of the right token among the next-best ones; None: it is not among them."""
    if branching is None:
        return None
    for rank, chance in enumerate(branching.chances):
        if draw < chance:
            return rank
        draw -= chance
    return None
