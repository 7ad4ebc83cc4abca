"""Decides which sequence holds how much of the KV cache, and which cached prefixes are reused.

Rules:

- Who holds what: an open sequence owns one buffer for the keys and values of its tokens. The
  manager knows the tokens of each buffer; the model runner owns the tensors. A slot is the
  handle of an open sequence.
- Memory budget: a sequence reserves its whole capacity when it opens, so an open sequence never
  runs out of memory.
- Prefix reuse: the buffer of a closed sequence is retained while there is room. A sequence that
  starts with the same tokens (a system prompt, an earlier turn of a conversation) copies their
  keys and values instead of computing them. Open sequences are donors, too.

This module has no tensors, devices or threads. ``check_integrity`` states what always holds.
"""

import bisect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from amusd.fleet.model_description import CacheUsage
from amusd.protocol.errors import CacheFullError, InvalidInputError, LimitExceededError

Buffer = TypeVar("Buffer")

MIN_CACHED = 16
"""A shorter prefix is computed again: copying it saves nothing."""

_MAX_RETAINED = 64
_RETAINED_SHARE = 4  # closed sequences keep at most this part of the memory


@dataclass(slots=True)
class _CachedSequence(Generic[Buffer]):
    """A buffer, the tokens whose keys and values it holds, and how many tokens it has room for."""

    buffer: Buffer
    capacity: int
    tokens: list[int] = field(default_factory=list)


class KVCacheManager(Generic[Buffer]):
    """The sequences of an engine, within a limit on the capacities of all of them."""

    def __init__(
        self,
        max_tokens: int,
        context_length: int,
        allocate: Callable[[int], Buffer],
        copy: Callable[[Buffer, Buffer, int], None] | None = None,
        free: Callable[[Buffer], None] = lambda _: None,
        unit: int = 1,
    ) -> None:
        """Manage at most ``max_tokens`` tokens of memory.

        Args:
            max_tokens: limit on the capacities of all sequences together.
            context_length: limit on the capacity of one sequence.
            allocate: returns a buffer for this many tokens.
            copy: copies the first n tokens of the first buffer to the second. None: nothing is
                retained or reused.
            free: takes back a buffer that is no longer used.
            unit: the memory of a sequence is a multiple of this many tokens.
        """
        self._max_tokens = max_tokens
        self._context_length = context_length
        self._allocate = allocate
        self._copy = copy
        self._free = free
        self._unit = unit
        self._open: dict[int, _CachedSequence[Buffer]] = {}
        self._retained: OrderedDict[int, _CachedSequence[Buffer]] = OrderedDict()  # oldest first
        self._next_slot = 0
        self._num_buffers = 0
        self._num_computed = 0
        self._num_cached = 0

    def __len__(self) -> int:
        """Return the number of open sequences."""
        return len(self._open)

    def __getitem__(self, slot: int) -> Buffer:
        """Return the buffer of an open sequence."""
        return self._open[slot].buffer

    @property
    def usage(self) -> CacheUsage:
        """What is in use, in tokens."""
        return CacheUsage(
            max_tokens=self._max_tokens,
            num_reserved=self._size(self._open),
            num_retained=self._size(self._retained),
            num_computed=self._num_computed,
            num_cached=self._num_cached,
        )

    def open(self, capacity: int) -> int:
        """Return the slot of a new empty sequence for at most ``capacity`` tokens.

        Raises:
            CacheFullError: it does not fit beside the open sequences. It fits once some close.
            InvalidInputError: it does not fit even if nothing else is open.
        """
        for limit, name in (
            (self._context_length, "the context that is served (--max-context, --cache-mib)"),
            (self._max_tokens, "the memory for keys and values (--cache-mib)"),
        ):
            if capacity > limit:
                raise InvalidInputError(
                    f"{capacity} tokens do not fit {name} of {limit} tokens: ask for fewer"
                )
        in_use = self._size(self._open)
        needed = self._reserved(capacity)
        if in_use + needed > self._max_tokens:
            raise CacheFullError(
                f"{in_use} of {self._max_tokens} tokens of memory are in use, {needed} more do "
                "not fit: try again later, or raise --cache-mib"
            )
        while in_use + self._size(self._retained) + needed > self._max_tokens:
            self._evict_oldest()
        self._next_slot += 1
        self._open[self._next_slot] = _CachedSequence(self._allocate(capacity), capacity)
        self._num_buffers += 1
        return self._next_slot

    def length(self, slot: int) -> int:
        """Return how many tokens of the sequence are in the cache."""
        return len(self._open[slot].tokens)

    def reuse(self, slot: int, tokens: Sequence[int]) -> int:
        """Reuse the longest cached prefix of ``tokens``, leaving at least one token to compute.

        The sequence's own tokens must be a prefix of ``tokens``. A prefix is never longer than
        the capacity of the sequence. Returns the number of tokens copied to it.
        """
        if self._copy is None:
            return 0
        target = self._open[slot]
        held, wanted = len(target.tokens), list(tokens[:-1])[: target.capacity]
        if len(wanted) < held + MIN_CACHED:
            return 0
        donors = [*self._retained.items(), *self._open.items()]
        donor_slot, donor = max(donors, key=lambda one: common_prefix(one[1].tokens, wanted))
        shared = common_prefix(donor.tokens, wanted)
        if donor is target or shared < held + MIN_CACHED:
            return 0
        self._copy(donor.buffer, target.buffer, shared)
        target.tokens = wanted[:shared]
        if donor_slot in self._retained:
            self._retained.move_to_end(donor_slot)
        self._num_cached += shared - held
        return shared - held

    def extend(self, slot: int, tokens: Sequence[int], is_prompt: bool = False) -> None:
        """Record tokens that a batch computes. Prompt tokens count for the hit rate.

        Raises:
            LimitExceededError: they exceed the capacity of the sequence. Nothing is recorded.
        """
        sequence = self._open[slot]
        if len(sequence.tokens) + len(tokens) > sequence.capacity:
            raise LimitExceededError(
                f"slot {slot} is full: it was opened for {sequence.capacity} tokens"
            )
        sequence.tokens.extend(tokens)
        if is_prompt:
            self._num_computed += len(tokens)

    def truncate(self, slot: int, length: int) -> None:
        """Drop the sequence's tokens from position ``length`` on."""
        del self._open[slot].tokens[length:]

    def close(self, slot: int) -> None:
        """Close the sequence. Its buffer is retained for reuse if it is worth the memory."""
        closed = self._open.pop(slot)
        if not self._is_worth_retaining(closed):
            self._release(closed)
            return
        for other_slot, other in list(self._retained.items()):
            if other.tokens[: len(closed.tokens)] == closed.tokens:
                self._retained.move_to_end(other_slot)
                self._release(closed)
                return
            if closed.tokens[: len(other.tokens)] == other.tokens:
                self._release(self._retained.pop(other_slot))
        self._retained[slot] = closed
        while len(self._retained) > _MAX_RETAINED or self._size(self._retained) > self._retainable:
            self._evict_oldest()

    def check_integrity(self) -> None:
        """Raise AssertionError if the manager's state contradicts itself."""
        usage, everyone = self.usage, [*self._open.values(), *self._retained.values()]
        if usage.num_reserved + usage.num_retained > self._max_tokens:
            raise AssertionError(f"more memory is in use than there is: {usage}")
        if usage.num_retained > self._retainable or len(self._retained) > _MAX_RETAINED:
            raise AssertionError(f"closed sequences retain too much: {usage}")
        if any(len(one.tokens) > one.capacity for one in everyone):
            raise AssertionError("a sequence holds more tokens than its capacity")
        if self._open.keys() & self._retained.keys():
            raise AssertionError("a sequence is open and closed at the same time")
        if not self._num_buffers == len(everyone) == len({id(one.buffer) for one in everyone}):
            raise AssertionError("a buffer has no owner, or more than one")
        for one in self._retained.values():
            others = (other for other in self._retained.values() if other is not one)
            if any(one.tokens == other.tokens[: len(one.tokens)] for other in others):
                raise AssertionError("a retained sequence is the prefix of another one")

    @property
    def _retainable(self) -> int:
        """Most tokens of memory that closed sequences keep."""
        return self._max_tokens // _RETAINED_SHARE

    def _is_worth_retaining(self, closed: _CachedSequence[Buffer]) -> bool:
        return (
            self._copy is not None
            and len(closed.tokens) >= MIN_CACHED
            and self._reserved(closed.capacity) <= self._retainable
        )

    def _evict_oldest(self) -> None:
        self._release(self._retained.popitem(last=False)[1])

    def _release(self, sequence: _CachedSequence[Buffer]) -> None:
        self._free(sequence.buffer)
        self._num_buffers -= 1

    def _size(self, sequences: dict[int, _CachedSequence[Buffer]]) -> int:
        return sum(self._reserved(sequence.capacity) for sequence in sequences.values())

    def _reserved(self, capacity: int) -> int:
        """Return how much of the memory a sequence of this capacity reserves, in tokens."""
        return -(-capacity // self._unit) * self._unit


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the longest common prefix of two sequences."""
    most = min(len(first), len(second))
    if first[:MIN_CACHED] != second[:MIN_CACHED]:  # the usual case, without a search
        most = min(most, MIN_CACHED)
    lengths = range(1, most + 1)
    return bisect.bisect_left(lengths, True, key=lambda n: first[:n] != second[:n])
