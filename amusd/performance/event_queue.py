"""Simulated time: what happens next."""

import heapq
from collections.abc import Callable


class EventQueue:
    """Actions in the order of their times. Equal times keep the order in which they came."""

    def __init__(self) -> None:
        """Start at 0 seconds with nothing to do."""
        self.now_seconds = 0.0
        self._num_added = 0
        self._waiting: list[tuple[float, int, Callable[[], None]]] = []

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Let ``action`` happen in ``seconds``."""
        self._num_added += 1
        heapq.heappush(self._waiting, (self.now_seconds + seconds, self._num_added, action))

    def step(self) -> bool:
        """Let the next action happen; return whether there was one."""
        if not self._waiting:
            return False
        self.now_seconds, _, action = heapq.heappop(self._waiting)
        action()
        return True
