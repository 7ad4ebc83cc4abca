"""How many sessions are open at a time: requests are let in or refused, never queued."""

import contextlib
from collections.abc import Iterator

from amusd.protocol.errors import InvalidInputError, LimitExceededError


class Seats:
    """The sessions that a request may have open."""

    def __init__(self, num_held: int) -> None:
        """Hold so many."""
        self.num_held = num_held

    def give_back(self) -> None:
        """Give one back before the request ends: its session is over."""
        self.num_held -= 1


class Admission:
    """Counts the sessions of all requests, up to a limit."""

    def __init__(self, max_sessions: int) -> None:
        """Allow ``max_sessions`` at a time."""
        self._max_sessions = max_sessions
        self._requests: list[Seats] = []

    @contextlib.contextmanager
    def admitted(self, num_sessions: int, most: int) -> Iterator[Seats]:
        """Let a request with so many sessions in; the services hold at most ``most`` of them.

        Raises:
            InvalidInputError: they never fit.
            LimitExceededError: too many are open now.
        """
        limit = max(1, min(self._max_sessions, most))
        if num_sessions > limit:
            raise InvalidInputError(
                f"num_completions is {num_sessions}: at most {limit} sessions can be open, so ask "
                "for fewer"
            )
        if self._num_open + num_sessions > self._max_sessions:
            raise LimitExceededError(
                f"{self._num_open} of {self._max_sessions} generations are running: try again later"
            )
        seats = Seats(num_sessions)
        self._requests.append(seats)
        try:
            yield seats
        finally:
            self._requests.remove(seats)

    @property
    def _num_open(self) -> int:
        return sum(seats.num_held for seats in self._requests)
