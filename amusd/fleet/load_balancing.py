"""Who of several equal replicas opens the next session, and which replicas are equal.

Rules of this file
- It counts and compares; who is healthy, and when a replica was asked, it is told.
- Several orchestrators may open sessions on the same replicas and share nothing. What a replica
  says counts the sessions of all of them, but is a moment old; what one has opened since, it
  knows itself, and takes the others to have done likewise.
- Ties are broken at random, for else all orchestrators would pick the same replica.
"""

import enum
import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from amusd.fleet.model_description import ModelDescription
from amusd.fleet.vocabulary import explain_difference

_MOST_ALIKE = 16.0  # orchestrators that are reckoned with


class ReplicaState(enum.Enum):
    """What a replica is good for."""

    AWAY = "away"  # out of reach, or not ready
    HEALTHY = "healthy"
    DRAINING = "draining"  # ends, or has left the pool; its open sessions go on
    REFUSED = "refused"  # serves something else than its pool


class ReplicaLoad:
    """The sessions on one replica: those it told of, and our own since."""

    __slots__ = ("_own_at_report", "_reported", "num_opened", "num_own")

    def __init__(self) -> None:
        """Start with nothing open."""
        self.num_own = 0
        self.num_opened = 0
        self._reported = 0
        self._own_at_report = 0

    def __repr__(self) -> str:
        return (
            f"ReplicaLoad(own={self.num_own}, opened={self.num_opened}, "
            f"reported={self._reported} beside {self._own_at_report})"
        )

    @property
    def num_sessions(self) -> int:
        """Sessions that are open or wait there, all orchestrators' as far as is known."""
        return max(self.num_own, self._reported + self._num_since)

    def opened(self) -> None:
        """Count a session of ours."""
        self.num_own += 1
        self.num_opened += 1

    def closed(self) -> None:
        """Count a session of ours out."""
        if self.num_own == 0:
            raise ValueError("a session is counted out that was not counted in")
        self.num_own -= 1

    def reported(self, num_sessions: int, num_own: int) -> None:
        """Take what the replica says; ``num_own`` were ours when it was asked."""
        self._reported = num_sessions
        self._own_at_report = num_own

    def lost(self) -> None:
        """Forget what the replica said: it has ended, and others' sessions with it."""
        self.reported(self.num_own, self.num_own)

    def expected(self, num_alike: float) -> float:
        """Return the sessions to expect there if ``num_alike`` orchestrators do as we do."""
        return max(float(self.num_own), self._reported + num_alike * self._num_since)

    @property
    def _num_since(self) -> int:
        return self.num_own - self._own_at_report

    @staticmethod
    def num_alike(loads: Iterable["ReplicaLoad"]) -> float:
        """Return how many orchestrators like us the sessions on ``loads`` speak of, 1 or more."""
        found = list(loads)
        num_reported = sum(load._reported for load in found)
        num_own = sum(load._own_at_report for load in found)
        return min(max(num_reported / max(1, num_own), 1.0), _MOST_ALIKE)


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """A replica for people: sessions of all orchestrators, of ours, and ours so far.

    ``reason`` says in words why it is not used; empty if it is.
    """

    address: str
    state: ReplicaState
    num_sessions: int
    num_own: int
    num_opened: int
    reason: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A healthy replica and its load."""

    address: str
    load: ReplicaLoad


def least_loaded(
    candidates: Collection[Candidate], avoid: Collection[str], chance: random.Random
) -> Candidate | None:
    """Return a candidate with the fewest sessions to expect, or None if there is none.

    Args:
        candidates: who may be chosen.
        avoid: addresses that have refused the session already.
        chance: breaks ties.
    """
    num_alike = ReplicaLoad.num_alike(candidate.load for candidate in candidates)
    possible = [candidate for candidate in candidates if candidate.address not in avoid]
    if not possible:
        return None
    least = min(candidate.load.expected(num_alike) for candidate in possible)
    return chance.choice(
        [candidate for candidate in possible if candidate.load.expected(num_alike) == least]
    )


def explain_mismatch(model: ModelDescription, pool: ModelDescription) -> str | None:
    """Say in one line why ``model`` may write other tokens than its pool; None if it may not.

    Weights of the same fingerprint may go by several names (a hub id, a folder).
    """
    difference = explain_difference(model.vocabulary, pool.vocabulary)
    if difference is not None or model.vocabulary.fingerprint != pool.vocabulary.fingerprint:
        return f"its vocabulary is another: {difference or 'it has none of its own'}"
    if model.weights_fingerprint and pool.weights_fingerprint:
        if model.weights_fingerprint != pool.weights_fingerprint:
            return (
                f"its weights are others: {model.name!r} has {model.weights_fingerprint[:12]}, "
                f"the pool {pool.weights_fingerprint[:12]} of {pool.name!r}"
            )
    elif model.name != pool.name:
        return f"it serves {model.name!r}, the pool {pool.name!r}"
    for name in ("dtype", "numerics", "weight_format"):
        ours, theirs = getattr(model, name), getattr(pool, name)
        if ours != theirs:
            return f"its {name} is {ours or 'unknown'}, the pool's {theirs or 'unknown'}"
    return None
