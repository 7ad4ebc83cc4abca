"""The slots of an engine: whose keys and values lie where, how much fits, and what is reused.

A slot's buffer is made for all tokens that its session may reach, and counted as such from the
start, so a session that was let in never runs out of memory. What a closed slot held is kept as
long as there is room: a later session that begins with the same tokens (a system prompt, an
earlier turn of a conversation) copies their keys and values instead of computing them again.
"""

import bisect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from amusd.fleet.model_description import CacheUsage
from amusd.protocol.errors import CacheFullError, LimitExceededError

Buffer = TypeVar("Buffer")

MIN_CACHED = 16
"""Fewer tokens are computed again: to copy them would save nothing."""

_MAX_RETAINED = 64
_RETAINED_SHARE = 4  # closed slots keep at most this part of the memory


@dataclass(slots=True)
class _Slot(Generic[Buffer]):
    """Tokens whose keys and values a buffer holds, and for how many it was made."""

    buffer: Buffer
    capacity: int
    tokens: list[int] = field(default_factory=list)


class KVCacheManager(Generic[Buffer]):
    """Slots of an engine within a limit on all their tokens."""

    def __init__(
        self,
        max_tokens: int,
        context_length: int,
        make: Callable[[int], Buffer],
        copy: Callable[[Buffer, Buffer, int], None] | None = None,
        drop: Callable[[Buffer], None] = lambda _: None,
        unit: int = 1,
    ) -> None:
        """Keep slots in at most ``max_tokens`` tokens of memory.

        Args:
            max_tokens: limit on the capacities of all slots together.
            context_length: limit on the capacity of one.
            make: makes a buffer for so many tokens.
            copy: copies the first so many tokens of the first buffer to the second; None: nothing
                is ever reused.
            drop: takes back a buffer that is not needed any more.
            unit: a slot takes a multiple of so many tokens of the memory.
        """
        self._max_tokens = max_tokens
        self._context_length = context_length
        self._make = make
        self._copy = copy
        self._drop = drop
        self._unit = unit
        self._slots: dict[int, _Slot[Buffer]] = {}
        self._retained: OrderedDict[int, _Slot[Buffer]] = OrderedDict()
        self._next_slot = 0
        self._num_computed = 0
        self._num_cached = 0

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, slot: int) -> Buffer:
        return self._slots[slot].buffer

    @property
    def usage(self) -> CacheUsage:
        """What is in use, in tokens."""
        return CacheUsage(
            max_tokens=self._max_tokens,
            num_reserved=self._size(self._slots),
            num_retained=self._size(self._retained),
            num_computed=self._num_computed,
            num_cached=self._num_cached,
        )

    def open(self, capacity: int) -> int:
        """Return a new empty slot for at most ``capacity`` tokens.

        Raises:
            CacheFullError: it does not fit beside the open ones; it will when some are closed.
            LimitExceededError: it would not fit even alone.
        """
        for limit, name in (
            (self._context_length, "the model's context"),
            (self._max_tokens, "the memory for keys and values (--cache-mib)"),
        ):
            if capacity > limit:
                raise LimitExceededError(f"{capacity} tokens do not fit {name} of {limit} tokens")
        in_use = self._size(self._slots)
        taken = self._taken(capacity)
        if in_use + taken > self._max_tokens:
            raise CacheFullError(
                f"{in_use} of {self._max_tokens} tokens of memory are in use, {taken} more do "
                "not fit: try again later, or raise --cache-mib"
            )
        while in_use + self._size(self._retained) + taken > self._max_tokens:
            self._drop_oldest()
        self._next_slot += 1
        self._slots[self._next_slot] = _Slot(self._make(capacity), capacity)
        return self._next_slot

    def length(self, slot: int) -> int:
        """Return how many tokens the slot holds."""
        return len(self._slots[slot].tokens)

    def reuse(self, slot: int, tokens: Sequence[int]) -> int:
        """Copy what another slot holds of the beginning of ``tokens``; return how many are new.

        What the slot holds already has to be the beginning of ``tokens``. The last token is never
        taken over, for an answer needs one that goes through the model, and never more than the
        slot was opened for.
        """
        if self._copy is None:
            return 0
        target = self._slots[slot]
        held, wanted = len(target.tokens), list(tokens[:-1])[: target.capacity]
        if len(wanted) < held + MIN_CACHED:
            return 0
        donors = [*self._retained.items(), *self._slots.items()]
        name, donor = max(donors, key=lambda one: common_prefix(one[1].tokens, wanted))
        shared = common_prefix(donor.tokens, wanted)
        if donor is target or shared < held + MIN_CACHED:
            return 0
        self._copy(donor.buffer, target.buffer, shared)
        target.tokens = wanted[:shared]
        if name in self._retained:
            self._retained.move_to_end(name)
        self._num_cached += shared - held
        return shared - held

    def extend(self, slot: int, tokens: Sequence[int], is_prompt: bool = False) -> None:
        """Note tokens that go through the model; those of prompts count for the hit rate.

        Raises:
            LimitExceededError: the slot was opened for fewer; nothing is noted.
        """
        held = self._slots[slot]
        if len(held.tokens) + len(tokens) > held.capacity:
            raise LimitExceededError(
                f"slot {slot} is full: it was opened for {held.capacity} tokens"
            )
        held.tokens.extend(tokens)
        if is_prompt:
            self._num_computed += len(tokens)

    def truncate(self, slot: int, length: int) -> None:
        """Forget what the slot holds beyond ``length`` tokens."""
        del self._slots[slot].tokens[length:]

    def close(self, slot: int) -> None:
        """Free the slot; what it held may be reused as long as nothing else needs the room."""
        closed = self._slots.pop(slot)
        most = self._max_tokens // _RETAINED_SHARE
        too_large = self._taken(closed.capacity) > most
        if self._copy is None or len(closed.tokens) < MIN_CACHED or too_large:
            self._drop(closed.buffer)
            return
        for name, other in list(self._retained.items()):
            if other.tokens[: len(closed.tokens)] == closed.tokens:
                self._retained.move_to_end(name)
                return
            if closed.tokens[: len(other.tokens)] == other.tokens:
                self._drop(self._retained.pop(name).buffer)
        self._retained[slot] = closed
        while len(self._retained) > _MAX_RETAINED or self._size(self._retained) > most:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        self._drop(self._retained.popitem(last=False)[1].buffer)

    def _size(self, slots: dict[int, _Slot[Buffer]]) -> int:
        return sum(self._taken(slot.capacity) for slot in slots.values())

    def _taken(self, capacity: int) -> int:
        """Return what a slot for ``capacity`` tokens takes of the memory."""
        return -(-capacity // self._unit) * self._unit


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common from the first on."""
    most = min(len(first), len(second))
    if first[:MIN_CACHED] != second[:MIN_CACHED]:  # the usual case, without a search
        most = min(most, MIN_CACHED)
    lengths = range(1, most + 1)
    return bisect.bisect_left(lengths, True, key=lambda n: first[:n] != second[:n])
