"""Load balancing between the replicas of a pool, and the check that they serve the same model.

Rules of this file
- It counts and compares. The caller says which replicas are healthy and what they report.
- Several orchestrators may use the same replicas, and they share nothing. A replica's report
  counts the sessions of all of them, but it is slightly out of date. An orchestrator adds the
  sessions that it has opened itself since the report, and assumes that every other orchestrator
  has opened as many.
- Ties are broken at random. Otherwise all orchestrators would choose the same replica.
"""

import enum
import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from amusd.fleet.model_description import ModelDescription
from amusd.fleet.vocabulary import explain_difference

_MAX_ORCHESTRATORS = 16.0  # upper bound of the estimate


class ReplicaState(enum.Enum):
    """Whether a replica takes sessions."""

    AWAY = "away"  # unreachable or not ready
    HEALTHY = "healthy"
    DRAINING = "draining"  # shutting down or removed from the pool; open sessions continue
    REFUSED = "refused"  # serves another model than its pool


class ReplicaLoad:
    """The number of sessions on one replica: the last report, and our own since then."""

    __slots__ = ("_own_at_report", "_reported", "num_opened", "num_own")

    def __init__(self) -> None:
        """Start without open sessions."""
        self.num_own = 0
        self.num_opened = 0
        self._reported = 0
        self._own_at_report = 0

    def __repr__(self) -> str:
        return (
            f"ReplicaLoad(own={self.num_own}, opened={self.num_opened}, "
            f"reported={self._reported}, own_at_report={self._own_at_report})"
        )

    @property
    def num_sessions(self) -> int:
        """Best estimate of the open and waiting sessions there, those of all orchestrators."""
        return max(self.num_own, self._reported + self._num_own_since)

    def opened(self) -> None:
        """Count one more own session."""
        self.num_own += 1
        self.num_opened += 1

    def closed(self) -> None:
        """Count one own session less.

        Raises:
            ValueError: no own session is open.
        """
        if self.num_own == 0:
            raise ValueError("no session is open on this replica")
        self.num_own -= 1

    def reported(self, num_sessions: int, num_own: int) -> None:
        """Record a report of the replica; ``num_own`` sessions were ours when it was asked."""
        self._reported = num_sessions
        self._own_at_report = num_own

    def lost(self) -> None:
        """Drop the last report: the replica has ended, and with it the sessions of others."""
        self.reported(self.num_own, self.num_own)

    def expected(self, num_orchestrators: float) -> float:
        """Return the expected number of sessions there.

        ``num_orchestrators`` is the number of orchestrators that open sessions at our rate.
        """
        return max(float(self.num_own), self._reported + num_orchestrators * self._num_own_since)

    @property
    def _num_own_since(self) -> int:
        """Own sessions now, less those at the time of the last report; may be negative."""
        return self.num_own - self._own_at_report

    @staticmethod
    def estimate_num_orchestrators(loads: Iterable["ReplicaLoad"]) -> float:
        """Return how many orchestrators with our number of sessions explain the reports.

        The result is 1 or more, and at most 16.
        """
        known = list(loads)
        num_reported = sum(load._reported for load in known)
        num_own = sum(load._own_at_report for load in known)
        return min(max(num_reported / max(1, num_own), 1.0), _MAX_ORCHESTRATORS)


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """A replica as ``GetServerInfo`` shows it.

    ``num_sessions`` counts the sessions of all orchestrators, ``num_own`` those of this one, and
    ``num_opened`` all that this one has ever opened there. ``reason`` says why the replica is not
    used; it is empty if the replica is used.
    """

    address: str
    state: ReplicaState
    num_sessions: int
    num_own: int
    num_opened: int
    reason: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A healthy replica, its load, and whether it is late with an answer."""

    address: str
    load: ReplicaLoad
    is_late: bool = False


def least_loaded(
    candidates: Collection[Candidate], avoid: Collection[str], rng: random.Random
) -> Candidate | None:
    """Return a candidate with the fewest expected sessions, or None if there is no candidate.

    A late candidate is taken only if all are late: its load may be far from its last report.

    Args:
        candidates: all healthy replicas of the pool.
        avoid: addresses of replicas that have already ended the session.
        rng: breaks ties.
    """
    num_orchestrators = ReplicaLoad.estimate_num_orchestrators(one.load for one in candidates)
    allowed = [one for one in candidates if one.address not in avoid]
    if not allowed:
        return None
    allowed = [one for one in allowed if not one.is_late] or allowed
    fewest = min(one.load.expected(num_orchestrators) for one in allowed)
    return rng.choice([one for one in allowed if one.load.expected(num_orchestrators) == fewest])


def explain_mismatch(model: ModelDescription, pool: ModelDescription) -> str | None:
    """Say in one line why ``model`` may give other tokens than its pool, or return None.

    The same weights may have several names, such as a hub id and a folder. So names are compared
    only where a weights fingerprint is missing.
    """
    difference = explain_difference(model.vocabulary, pool.vocabulary)
    if difference is not None or model.vocabulary.fingerprint != pool.vocabulary.fingerprint:
        return f"its vocabulary differs: {difference or 'it has none of its own'}"
    if model.weights_fingerprint and pool.weights_fingerprint:
        if model.weights_fingerprint != pool.weights_fingerprint:
            return (
                f"its weights differ: {model.name!r} has {model.weights_fingerprint[:12]}, "
                f"the pool's {pool.name!r} has {pool.weights_fingerprint[:12]}"
            )
    elif model.name != pool.name:
        return f"it serves {model.name!r}, the pool serves {pool.name!r}"
    for name in ("dtype", "numerics", "weight_format"):
        ours, theirs = getattr(model, name), getattr(pool, name)
        if ours != theirs:
            return f"its {name} is {ours or 'unknown'}, the pool's {theirs or 'unknown'}"
    return None
