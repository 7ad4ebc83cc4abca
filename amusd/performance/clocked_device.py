"""A device of a simulation: it takes its messages between two batches, as an engine thread does."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from amusd.performance.deployment import StepSeconds
from amusd.performance.event_queue import EventQueue


class ClockedDevice(ABC):
    """Runs one batch after the other while there is something to run."""

    def __init__(self, queue: EventQueue, step_seconds: StepSeconds) -> None:
        """Run batches that take ``step_seconds`` in the time of ``queue``."""
        self._queue = queue
        self._step_seconds = step_seconds
        self._messages: list[Callable[[], None]] = []
        self._is_busy = False
        self._is_woken = False
        self.busy_seconds = 0.0
        self.num_batches = 0

    def receive(self, message: Callable[[], None]) -> None:
        """Take a message now, or at the end of the running batch."""
        self._messages.append(message)
        if not self._is_busy and not self._is_woken:
            self._is_woken = True
            self._queue.after(0.0, self._wake)  # after all messages of this time

    def _wake(self) -> None:
        self._is_woken = False
        if not self._is_busy:
            self.go_on()

    def go_on(self) -> None:
        """Take what has arrived, and run the next batch if there is one."""
        messages, self._messages = self._messages, []
        for message in messages:
            message()
        num_tokens = self._schedule()
        if not num_tokens:
            return
        seconds = self._step_seconds.of(num_tokens)
        self._is_busy = True
        self.busy_seconds += seconds
        self.num_batches += 1
        self._queue.after(seconds, lambda: self._finish(seconds))

    def _finish(self, seconds: float) -> None:
        self._is_busy = False
        self._settle(seconds)
        self.go_on()

    @abstractmethod
    def _schedule(self) -> int:
        """Choose the next batch; return its number of tokens, 0 if there is none."""

    @abstractmethod
    def _settle(self, seconds: float) -> None:
        """Take the results of the batch, which took ``seconds``."""
