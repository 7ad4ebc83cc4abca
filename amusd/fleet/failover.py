"""Failover: whether a session that a replica has ended is opened on another one.

Rules of this file
- A replica that refuses a session has computed nothing of it. Another one is tried.
- A replica that fails under a session may have failed because of it. Another one is tried once, so
  that one request never takes down one replica after the other.
- A request that is wrong is wrong everywhere. No other replica is tried.
"""

import enum

_MAX_TRIED = 4  # replicas of one role for one session, refusals included
_MAX_FAILED = 2  # replicas that may fail under one session


class Ending(enum.Enum):
    """How a replica ended a session that was not over."""

    REFUSED = "refused"  # shutting down or out of reach: it has computed nothing
    FAILED = "failed"  # a failed pass, a lost connection, no answer: the session may be the cause
    UNKNOWN = "unknown"  # the status was lost; the same replica may be tried again
    FINAL = "final"  # wrong, or too much for the replica (RESOURCE_EXHAUSTED): no other is tried


class Attempts:
    """The replicas of one role that ended one session."""

    def __init__(self) -> None:
        """Start with none."""
        self.avoided: set[str] = set()
        self._num_ended = 0
        self._failed: set[str] = set()

    def may_move(self, address: str, ending: Ending) -> bool:
        """Record that the replica at ``address`` ended the session; return whether to open it anew.

        Addresses in ``avoided`` are not tried again.
        """
        self._num_ended += 1
        if ending in (Ending.FAILED, Ending.UNKNOWN):  # a lost status may have been a failure
            self._failed.add(address)
        if ending is not Ending.UNKNOWN:
            self.avoided.add(address)
        if ending is Ending.FINAL or self._num_ended >= _MAX_TRIED:
            return False
        return ending is not Ending.FAILED or len(self._failed) < _MAX_FAILED
