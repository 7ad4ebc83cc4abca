"""The sessions of a worker: who is open, who waits in line for memory, and whose turn is next.

A session that finds no memory waits, first come, first served. It exists all the same, so that
what is said to it meanwhile is kept within the session's own limits. Belongs to the engine thread.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from amusd.fleet.model_description import CacheUsage, ServiceLimits
from amusd.protocol.errors import (
    AmusdError,
    CacheFullError,
    DuplicateSessionError,
    LimitExceededError,
)


class Slots(Protocol):
    """Where sessions get their slots from: an engine, or a drafter."""

    @property
    def usage(self) -> CacheUsage:
        """How much memory for keys and values is in use."""

    def open(self, capacity: int) -> int:
        """Return a new slot for at most ``capacity`` tokens."""

    def close(self, slot: int) -> None:
        """Free the slot."""


class Task(Protocol):
    """What a worker keeps of a session."""

    slot: int | None
    """None: it waits for memory."""
    failed: bool

    def tell(self, error: AmusdError) -> None:
        """Send the error that ends the session."""


Kept = TypeVar("Kept", bound=Task)


class Sessions(Generic[Kept]):
    """All sessions of a worker by name, the one whose turn is next at the front."""

    def __init__(self, slots: Slots, limits: ServiceLimits) -> None:
        """Keep sessions in ``slots``, as many as ``limits`` allow."""
        self._slots = slots
        self._limits = limits
        self._tasks: dict[str, Kept] = {}
        self._line: dict[str, int] = {}  # what waits, with the capacity that it needs

    @property
    def num_open(self) -> int:
        """Number of sessions that have a slot."""
        return len(self._tasks) - self.num_waiting

    @property
    def num_waiting(self) -> int:
        """Number of sessions that wait for memory."""
        return len(self._line)

    def __getitem__(self, name: str) -> Kept:
        return self._tasks[name]

    def get(self, name: str) -> Kept | None:
        """Return a session, or None if there is none of this name."""
        return self._tasks.get(name)

    def check_new(self, name: str) -> None:
        """Raise if no session of this name can be added.

        Raises:
            DuplicateSessionError: there is one already.
            LimitExceededError: there are as many as there may be.
        """
        if name in self._tasks:
            raise DuplicateSessionError(f"session {name!r} is open already: choose another id")
        if len(self._tasks) >= self._limits.max_sessions:
            raise LimitExceededError(
                f"{self._limits.max_sessions} sessions are open: try again later, or raise "
                "--max-sessions"
            )

    def add(self, name: str, task: Kept, capacity: int) -> None:
        """Add a session with a slot for ``capacity`` tokens, or at the end of the line for one.

        Raises:
            CacheFullError: no memory is left, and as many wait for it as may.
            LimitExceededError: the capacity is above what one session can have.
        """
        # Nobody overtakes those who wait; but what will never fit is told so at once.
        if not self._line or capacity > self._slots.usage.max_tokens:
            try:
                task.slot = self._slots.open(capacity)
            except CacheFullError:
                if not self._limits.max_waiting:
                    raise
        if task.slot is None:
            if self.num_waiting >= self._limits.max_waiting:
                raise CacheFullError(
                    f"no memory is left, and {self.num_waiting} sessions wait for some: try again "
                    "later, or raise --cache-mib or --max-waiting"
                )
            self._line[name] = capacity
        self._tasks[name] = task

    def remove(self, name: str) -> list[Kept]:
        """Forget a session and free its slot; return those that came out of the line for it."""
        task = self._tasks.pop(name)
        self._line.pop(name, None)
        if task.slot is not None:
            self._slots.close(task.slot)
        return list(self._let_in())

    def give_up(self, name: str) -> list[Kept]:
        """End a session that still waits for memory; return those that came out of the line."""
        if name not in self._line:
            return []
        del self._line[name]
        if not self._tasks[name].failed:
            fail(
                self._tasks[name],
                CacheFullError(
                    "no memory came free within --max-wait: try again later, or raise --cache-mib"
                ),
            )
        return list(self._let_in())

    def due(self, is_due: Callable[[Kept], object]) -> Iterator[Kept]:
        """Yield what has a slot and is due, in the order of their turns."""
        for task in self._tasks.values():
            if task.slot is not None and not task.failed and is_due(task):
                yield task

    def took_turn(self, tasks: Iterable[Kept]) -> None:
        """Move these behind all others, which keep their places."""
        taken = {id(task) for task in tasks}
        behind = {name: task for name, task in self._tasks.items() if id(task) in taken}
        for name, task in behind.items():
            del self._tasks[name]
            self._tasks[name] = task

    def _let_in(self) -> Iterator[Kept]:
        """Give slots to those in front of the line, as far as there is memory."""
        while self._line:
            name, capacity = next(iter(self._line.items()))
            task = self._tasks[name]
            try:
                task.slot = self._slots.open(capacity)
            except CacheFullError:
                return
            except AmusdError as error:
                fail(task, error)
            del self._line[name]
            if task.slot is not None:
                yield task


def fail(task: Task, error: AmusdError) -> None:
    """End a session with an error; its stream closes it then, so that its id stays taken."""
    task.failed = True
    task.tell(error)


def slot_of(task: Task) -> int:
    """Return the slot of a session that has one."""
    if task.slot is None:
        raise AssertionError("a session that waits for memory took part in a pass")
    return task.slot


def shares(seconds: float, num_tokens: list[int]) -> list[float]:
    """Divide the time of a pass by the tokens that each session brought to it, [sessions].

    Who brought none (a look-up) counts as one, for 0 would mean that nothing is known.
    """
    weights = [max(1, num) for num in num_tokens]
    return [seconds * weight / sum(weights) for weight in weights]
