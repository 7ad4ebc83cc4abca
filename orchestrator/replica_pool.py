"""A pool: the replicas behind the configured entries of one role, kept up to date while it runs.

``Pool.run`` resolves the entries periodically and owns one task for each replica. The caller that
starts ``run`` cancels it. A replica that is no longer listed gets no new sessions, and is removed
when our last session there ends. If an entry cannot be resolved, its replicas stay in the pool.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Generic

from amusd.fleet.load_balancing import Candidate, ReplicaState, least_loaded
from amusd.protocol.errors import UnavailableError
from orchestrator.addresses import Entry, Resolver, resolve
from orchestrator.replica import Replica, ServiceKind, Stub, Validate

log = logging.getLogger(__name__)

_MAX_REASONS = 3


@dataclass(slots=True)
class Lease(Generic[Stub]):
    """One session on a replica; it counts as load there until ``release``."""

    replica: Replica[Stub]
    is_held: bool = True

    @property
    def stub(self) -> Stub:
        """The stub of the replica's service."""
        return self.replica.stub

    @property
    def address(self) -> str:
        """The replica's address, ``host:port``."""
        return self.replica.address

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection to the replica."""
        return self.replica.is_connected

    @property
    def is_answering(self) -> bool:
        """Whether the replica answers."""
        return self.replica.answers.is_usable(time.monotonic())

    def served(self) -> None:
        """Record a message of the replica to the session."""
        self.replica.answers.served(time.monotonic())

    def failed(self, since_seconds: float, reason: str) -> None:
        """Record that the session has had no answer since then, by ``time.monotonic``."""
        self.replica.answers.session_failed(since_seconds, time.monotonic(), reason)

    def release(self) -> None:
        """Stop counting the session; later calls do nothing."""
        if self.is_held:
            self.is_held = False
            self.replica.load.closed()


class Pool(Generic[Stub]):
    """The replicas of one role."""

    def __init__(
        self,
        kind: ServiceKind[Stub],
        entries: Sequence[Entry],
        validate: Validate,
        resolver: Resolver,
        interval_seconds: float,
        timeout_seconds: float,
        use_proxy: bool = False,
    ) -> None:
        """Resolve ``entries`` every ``interval_seconds``.

        ``validate`` returns the reason to refuse a replica's model, or None to accept it. Replicas
        have to answer calls within ``timeout_seconds``. They are reached through the proxy of the
        environment with ``use_proxy`` only.
        """
        self.entries = tuple(entries)
        self._kind = kind
        self._validate = validate
        self._resolver = resolver
        self._interval_seconds = interval_seconds
        self._use_proxy = use_proxy
        self._timeout_seconds = timeout_seconds
        self._replicas: dict[str, Replica[Stub]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failures: dict[Entry, str] = {}
        self._resolved: dict[Entry, frozenset[str]] = {}
        self._changed = asyncio.Event()
        self._rng = random.Random()

    @property
    def replicas(self) -> list[Replica[Stub]]:
        """All replicas, sorted by address."""
        return sorted(self._replicas.values(), key=lambda replica: replica.address)

    @property
    def usable(self) -> list[Replica[Stub]]:
        """The replicas that take new sessions, sorted by address."""
        return [one for one in self.replicas if one.state is ReplicaState.HEALTHY]

    @property
    def is_all_refused(self) -> bool:
        """Whether there are replicas, and all of them serve another model than the pool."""
        states = {replica.state for replica in self.replicas}
        return states == {ReplicaState.REFUSED}

    async def run(self) -> None:
        """Keep the pool up to date until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.gather(*(self._resolve(entry) for entry in self.entries))
                self._update(group)
                await asyncio.sleep(self._interval_seconds)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds; it is checked after each change of the pool."""
        while not condition():
            await self._changed.wait()

    def has_other(self, avoid: Collection[str]) -> bool:
        """Whether a usable replica has an address that is not in ``avoid``."""
        return any(one.address not in avoid for one in self.usable)

    def take(self, avoid: Collection[str] = (), preferred: str = "") -> Lease[Stub]:
        """Return a lease on the least loaded usable replica whose address is not in ``avoid``.

        The replica with the address ``preferred`` is taken while it has room.

        Raises:
            UnavailableError: no replica can be used; the message is that of ``problem``.
        """
        now = time.monotonic()
        candidates = [
            Candidate(one.address, one.load, one.answers.is_late(now)) for one in self.usable
        ]
        is_preferred = preferred not in avoid and self._has_room(preferred)
        chosen = next(
            (one for one in candidates if is_preferred and one.address == preferred), None
        )
        chosen = chosen or least_loaded(candidates, avoid, self._rng)
        if chosen is None:
            raise UnavailableError(self.problem(avoid))
        replica = self._replicas[chosen.address]
        replica.load.opened()
        replica.answers.session_opened(now)
        return Lease(replica)

    def _has_room(self, address: str) -> bool:
        """Whether one more session is open at once on a replica, as far as is known."""
        replica = self._replicas.get(address)
        if replica is None or replica.info is None:
            return False
        return replica.load.num_sessions < replica.info.limits.max_sessions

    def problem(self, avoid: Collection[str] = ()) -> str:
        """Return one line that says why no replica can be used, and what to do."""
        reasons = list(self._failures.values())
        for replica in self.replicas:
            reason = replica.status.reason
            if not reason and replica.address in avoid:
                reason = "it has just refused the session, or failed under it"
            reasons.append(f"{replica.address}: {reason}")
        if not reasons:
            reasons = [f"{', '.join(map(str, self.entries))} not resolved yet"]
        more = f" and {len(reasons) - _MAX_REASONS} more" if len(reasons) > _MAX_REASONS else ""
        return (
            f"{self._kind.role} service cannot be used ({'; '.join(reasons[:_MAX_REASONS])}"
            f"{more}): start one, or give its address with --{self._kind.role}, and try again"
        )

    async def _resolve(self, entry: Entry) -> None:
        """Resolve one entry; a failure is logged when it begins and when it ends."""
        try:
            found = await resolve(entry, self._resolver)
        except UnavailableError as error:
            if entry not in self._failures:
                log.warning("%s pool: %s", self._kind.role, error)
            self._failures[entry] = str(error)
        else:
            if self._failures.pop(entry, None):
                log.info("%s pool: %s can be resolved again", self._kind.role, entry)
            self._resolved[entry] = frozenset(str(endpoint) for endpoint in found)

    def _update(self, group: asyncio.TaskGroup) -> None:
        """Add and remove replicas as the entries resolve now."""
        listed = frozenset[str]().union(*self._resolved.values())
        for address in sorted(listed - self._replicas.keys()):
            replica = Replica(
                self._kind,
                address,
                self._validate,
                self._notify,
                self._timeout_seconds,
                self._use_proxy,
            )
            self._replicas[address] = replica
            self._tasks[address] = group.create_task(replica.run())
        for address, replica in list(self._replicas.items()):
            if replica.is_listed != (address in listed):
                replica.is_listed = address in listed
                change = "back in" if replica.is_listed else "no longer in"
                log.info("%s replica %s is %s the pool", self._kind.role, address, change)
            if not replica.is_listed and replica.load.num_own == 0:
                self._tasks.pop(address).cancel()
                del self._replicas[address]
        self._notify()

    def _notify(self) -> None:
        """Wake every ``until`` that waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()
