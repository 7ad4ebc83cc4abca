"""A pool: the replicas behind the entries of one role, kept up to date while it runs.

``run`` looks the entries up again and again, and owns one task for each replica; it is cancelled
by whoever started it. A replica that is no longer listed gets no new sessions, and is forgotten
once ours there are over. Entries that cannot be looked up leave the pool as it was.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Generic

from amusd.fleet.load_balancing import Candidate, ReplicaState, least_loaded
from amusd.protocol.errors import UnavailableError
from orchestrator.addresses import Entry, Lookup, resolve
from orchestrator.replica import Kind, Replica, Stub, Validate

log = logging.getLogger(__name__)

_MOST_REASONS = 3


@dataclass(slots=True)
class Lease(Generic[Stub]):
    """A session's place on a replica; it counts there until it is released."""

    replica: Replica[Stub]
    is_taken: bool = True

    @property
    def stub(self) -> Stub:
        """What to call."""
        return self.replica.stub

    @property
    def address(self) -> str:
        """Where the replica is."""
        return self.replica.address

    def release(self) -> None:
        """Count the session out, once."""
        if self.is_taken:
            self.is_taken = False
            self.replica.load.closed()


class Pool(Generic[Stub]):
    """The replicas of one role."""

    def __init__(
        self,
        kind: Kind[Stub],
        entries: Sequence[Entry],
        validate: Validate,
        lookup: Lookup,
        interval_seconds: float,
    ) -> None:
        """Look ``entries`` up every ``interval_seconds``; ``validate`` refuses models."""
        self.entries = tuple(entries)
        self._kind = kind
        self._validate = validate
        self._lookup = lookup
        self._interval_seconds = interval_seconds
        self._replicas: dict[str, Replica[Stub]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._problems: dict[Entry, str] = {}
        self._known: dict[Entry, frozenset[str]] = {}
        self._changed = asyncio.Event()
        self._chance = random.Random()

    @property
    def replicas(self) -> list[Replica[Stub]]:
        """All replicas, in the order of their addresses."""
        return sorted(self._replicas.values(), key=lambda replica: replica.address)

    @property
    def usable(self) -> list[Replica[Stub]]:
        """Those that take sessions."""
        return [one for one in self.replicas if one.state is ReplicaState.HEALTHY]

    @property
    def is_refused_as_a_whole(self) -> bool:
        """Whether each replica serves something else than the pool should."""
        states = {replica.state for replica in self.replicas}
        return states == {ReplicaState.REFUSED}

    async def run(self) -> None:
        """Keep the pool up to date until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.gather(*(self._look_up(entry) for entry in self.entries))
                self._update(group)
                await asyncio.sleep(self._interval_seconds)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return when ``condition`` holds; it is asked again at each change of the pool."""
        while not condition():
            await self._changed.wait()

    def take(self, avoid: Collection[str] = ()) -> Lease[Stub]:
        """Return a place on the least loaded replica whose address is not in ``avoid``.

        Raises:
            UnavailableError: no replica can be used; says why, and what to do.
        """
        candidates = [Candidate(replica.address, replica.load) for replica in self.usable]
        chosen = least_loaded(candidates, avoid, self._chance)
        if chosen is None:
            raise UnavailableError(self.problem(avoid))
        chosen.load.opened()
        return Lease(self._replicas[chosen.address])

    def problem(self, avoid: Collection[str] = ()) -> str:
        """Say in one line why no replica can be used, and what to do."""
        reasons = list(self._problems.values())
        for replica in self.replicas:
            reason = replica.status.reason
            if not reason and replica.address in avoid:
                reason = "it has just refused the session"
            reasons.append(f"{replica.address}: {reason}")
        if not reasons:
            reasons = [f"{', '.join(map(str, self.entries))} not looked up yet"]
        more = f" and {len(reasons) - _MOST_REASONS} more" if len(reasons) > _MOST_REASONS else ""
        return (
            f"{self._kind.role} service cannot be used ({'; '.join(reasons[:_MOST_REASONS])}"
            f"{more}): start one, or give its address by --{self._kind.role}, and try again"
        )

    async def _look_up(self, entry: Entry) -> None:
        """Find out what an entry stands for now; a problem is logged once."""
        try:
            found = await resolve(entry, self._lookup)
        except UnavailableError as error:
            if entry not in self._problems:
                log.warning("%s pool: %s", self._kind.role, error)
            self._problems[entry] = str(error)
        else:
            if self._problems.pop(entry, None):
                log.info("%s pool: %s can be looked up now", self._kind.role, entry)
            self._known[entry] = frozenset(str(endpoint) for endpoint in found)

    def _update(self, group: asyncio.TaskGroup) -> None:
        """Let replicas come and go as they are listed."""
        listed = frozenset[str]().union(*self._known.values())
        for address in sorted(listed - self._replicas.keys()):
            replica = Replica(self._kind, address, self._validate, self._notify)
            self._replicas[address] = replica
            self._tasks[address] = group.create_task(replica.run())
        for address, replica in list(self._replicas.items()):
            if replica.is_listed != (address in listed):
                replica.is_listed = address in listed
                sign = "back in" if replica.is_listed else "no longer in"
                log.info("%s replica %s is %s the pool", self._kind.role, address, sign)
            if not replica.is_listed and replica.load.num_own == 0:
                self._tasks.pop(address).cancel()
                del self._replicas[address]
        self._notify()

    def _notify(self) -> None:
        """Wake who waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()
