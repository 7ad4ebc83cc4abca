"""The scheduler: which sequences are in the next batch, and with how many tokens.

Rules of this file
- Pure: no torch, grpc, asyncio or clock. It serves draft and verify service alike.
- A sequence without memory waits, first come, first served. It exists all the same: its session's
  messages are kept within the session's own limits.
- Round robin: a sequence that took part in a batch moves behind all others.
- Prefill is chunked. All prompts of a batch share a budget of tokens; a sequence that decodes takes
  part whatever the budget.
- A prefix that another sequence computes in this batch is waited for, then copied.

Intervals, for C computed tokens, a chunk of c and n tokens in all:

    [0 ......... C)[C ..... C + c)[C + c ..... n)
     in the KV cache this batch    later batches
"""

from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from amusd.engine.interface import NO_TOKEN
from amusd.engine.kv.cache_manager import MIN_CACHED, common_prefix
from amusd.fleet.model_description import CacheUsage, ServiceLimits
from amusd.protocol.errors import (
    CacheFullError,
    DuplicateSessionError,
    LimitExceededError,
)
from amusd.sampling.parameters import SequenceSampling
from amusd.serving.sequence import Sequence
from amusd.serving.session_fault import EXITS, end_session

_MAX_DECODE_TOKENS = 16
"""Tokens that a decoding sequence may have to compute: accepted, or looked up, since its last
batch. With more it counts as prefill."""
_MAX_PROMPT_OUTPUTS = 128
"""Tokens of a prompt that get log-probabilities in one batch: each has logits in memory."""

SequenceT = TypeVar("SequenceT", bound=Sequence)


class KVCache(Protocol):
    """What the scheduler asks of the KV cache; an engine has it."""

    @property
    def usage(self) -> CacheUsage:
        """How much memory is in use."""

    def open(self, capacity: int, sampling: SequenceSampling) -> int:
        """Reserve memory for ``capacity`` tokens, sampled by ``sampling``, and return its slot.

        Raises:
            CacheFullError: no memory is left for it now.
            InvalidInputError: it would not fit even alone, or the engine cannot sample like this.
        """

    def length(self, slot: int) -> int:
        """Return the number of computed tokens of a slot."""

    def reuse(self, slot: int, tokens: Tokens[int]) -> int:
        """Copy the longest prefix of ``tokens`` that another slot holds; return what it added."""

    def close(self, slot: int) -> None:
        """Free the memory of a slot."""


@dataclass(frozen=True, slots=True)
class Scheduled(Generic[SequenceT]):
    """A sequence in a batch, with the tokens it brings.

    The last ``num_outputs`` of ``tokens`` are answered with the model's next token; 0 for a chunk
    of a prompt that is not the last one. If the prompt gets log-probabilities, all its tokens have
    an output, and ``targets`` are the tokens that follow them, as ``ScheduledSequence`` has them.
    """

    sequence: SequenceT
    tokens: list[int]
    num_outputs: int
    is_prefill: bool
    targets: tuple[int, ...] = ()


class Scheduler(Generic[SequenceT]):
    """The sequences of one engine by session id, the next in turn first."""

    def __init__(
        self,
        cache: KVCache,
        limits: ServiceLimits,
        max_batch: int,
        prefill_budget: int,
        reuses_prefixes: bool = True,
    ) -> None:
        """Schedule batches of at most ``max_batch`` sequences.

        Args:
            cache: where sequences get their memory.
            limits: most sessions, open and waiting.
            max_batch: most sequences in a batch.
            prefill_budget: most prompt tokens in a batch, over all its sequences.
            reuses_prefixes: whether the cache copies prefixes between slots.
        """
        self._cache = cache
        self._limits = limits
        self._max_batch = max_batch
        self.prefill_budget = prefill_budget
        self._reuses_prefixes = reuses_prefixes
        self._sequences: dict[str, SequenceT] = {}
        self._waiting: dict[str, SequenceT] = {}
        self._left_out: set[str] = set()  # due, but without a place in the last batch

    @property
    def num_open(self) -> int:
        """Number of sequences that have memory."""
        return sum(sequence.slot is not None for sequence in self._sequences.values())

    @property
    def num_waiting(self) -> int:
        """Number of sequences that wait for memory."""
        return len(self._waiting)

    @property
    def num_left_out(self) -> int:
        """Number of sequences that were due, but found no place in the last batch."""
        return len(self._left_out)

    def get(self, session_id: str) -> SequenceT | None:
        """Return a sequence, or None if no session of this id is open."""
        return self._sequences.get(session_id)

    def __getitem__(self, session_id: str) -> SequenceT:
        return self._sequences[session_id]

    def all(self) -> list[SequenceT]:
        """Return all sequences, the next in turn first."""
        return list(self._sequences.values())

    def runnable(self) -> list[SequenceT]:
        """Return the sequences that can take part in a batch, the next in turn first."""
        return [sequence for sequence in self._sequences.values() if sequence.is_runnable]

    def check_new(self, session_id: str) -> None:
        """Raise if no session of this id can be added.

        Raises:
            DuplicateSessionError: there is one already.
            LimitExceededError: as many sessions are open as the limits allow.
        """
        if session_id in self._sequences:
            raise DuplicateSessionError(
                f"session {session_id!r} is open already: choose another id"
            )
        if len(self._sequences) >= self._limits.max_sessions:
            raise LimitExceededError(
                f"{self._limits.max_sessions} sessions are open: try again later, or raise "
                "--max-sessions"
            )

    def add(self, sequence: SequenceT) -> None:
        """Add a sequence with memory for its capacity, or at the end of the waiting queue.

        Raises:
            CacheFullError: no memory is left, and the waiting queue is full.
            InvalidInputError: the capacity is above what one sequence can have, or the engine
                cannot sample like this.
        """
        # No sequence overtakes the waiting ones. One that can never fit is refused at once.
        if not self._waiting or sequence.capacity > self._cache.usage.max_tokens:
            try:
                sequence.slot = self._cache.open(sequence.capacity, sequence.sampling)
            except CacheFullError:
                if not self._limits.max_waiting:
                    raise
        if sequence.slot is None:
            if self.num_waiting >= self._limits.max_waiting:
                raise CacheFullError(
                    f"no KV cache is left, and {self.num_waiting} sessions wait for some: try "
                    "again later, or raise --cache-mib or --max-waiting"
                )
            self._waiting[sequence.session_id] = sequence
        self._sequences[sequence.session_id] = sequence

    def remove(self, session_id: str) -> list[SequenceT]:
        """Forget a sequence and free its memory; return those that got memory in its place."""
        sequence = self._sequences.pop(session_id)
        self._left_out.discard(session_id)
        self._waiting.pop(session_id, None)
        if sequence.slot is not None:
            self._cache.close(sequence.slot)
            sequence.slot = None
        return list(self._admit_waiting())

    def give_up(self, session_id: str) -> list[SequenceT]:
        """End a session that still waits for memory; return those that got memory in its place."""
        sequence = self._waiting.pop(session_id, None)
        if sequence is None:
            return []
        if not sequence.has_failed:
            sequence.fail(
                CacheFullError(
                    "no KV cache came free within --max-wait: try again later, or raise --cache-mib"
                )
            )
        return list(self._admit_waiting())

    def schedule(self) -> list[Scheduled[SequenceT]]:
        """Return the next batch; empty if no sequence is due.

        A sequence whose scheduling fails ends, and the others take part.
        """
        batch: list[Scheduled[SequenceT]] = []
        prefill = _PrefillBudget(self.prefill_budget)
        self._left_out.clear()
        for session_id, sequence in self._sequences.items():
            if not (sequence.is_runnable and sequence.is_due):
                continue
            has_room = len(batch) < self._max_batch
            try:
                scheduled = self._schedule_one(sequence, prefill) if has_room else None
            except EXITS:
                raise
            except BaseException as error:
                end_session(sequence, error, "scheduling")
                continue
            if scheduled is not None:
                batch.append(scheduled)
            else:
                self._left_out.add(session_id)
        self._move_behind(batch)
        return batch

    def check_integrity(self) -> None:
        """Raise AssertionError if the state is inconsistent."""
        for session_id, sequence in self._waiting.items():
            if self._sequences.get(session_id) is not sequence:
                raise AssertionError(f"session {session_id!r} waits but is not open")
        if not self._left_out <= self._sequences.keys():
            raise AssertionError(f"left out, but not open: {self._left_out}")
        for session_id, sequence in self._sequences.items():
            if sequence.slot is None and not sequence.has_failed:
                if session_id not in self._waiting:
                    raise AssertionError(f"session {session_id!r} is neither open nor waiting")
            elif sequence.slot is not None and session_id in self._waiting:
                raise AssertionError(f"session {session_id!r} has memory and waits for it")

    def _schedule_one(
        self, sequence: SequenceT, prefill: "_PrefillBudget"
    ) -> Scheduled[SequenceT] | None:
        """Return what a sequence brings to the batch; None if its prompt has to wait."""
        tokens, slot = sequence.tokens, sequence.slot
        assert slot is not None
        num_computed = self._cache.length(slot)
        is_prefill = num_computed < sequence.num_prompt_tokens
        end = len(tokens)
        if is_prefill or end - num_computed > min(_MAX_DECODE_TOKENS, self.prefill_budget):
            if not prefill.num_left:
                return None
            if sequence.has_prompt_logprobs:  # they need all tokens computed
                end = min(end, num_computed + _MAX_PROMPT_OUTPUTS)
            else:
                num_cached = self._cache.reuse(slot, tokens)
                sequence.num_cached_tokens += num_cached
                num_computed += num_cached
                if self._reuses_prefixes and prefill.is_computing(tokens, num_computed):
                    return None
            is_prefill = num_computed < sequence.num_prompt_tokens
            end = prefill.take(tokens, num_computed, end)
        return _scheduled(sequence, num_computed, end, is_prefill)

    def _move_behind(self, batch: list[Scheduled[SequenceT]]) -> None:
        """Move the sequences of a batch behind all others, which keep their order."""
        if len(batch) == len(self._sequences):
            return
        for scheduled in batch:
            session_id = scheduled.sequence.session_id
            self._sequences[session_id] = self._sequences.pop(session_id)

    def _admit_waiting(self) -> Iterator[SequenceT]:
        """Give memory to the first waiting sequences, as far as it goes."""
        while self._waiting:
            session_id, sequence = next(iter(self._waiting.items()))
            try:
                sequence.slot = self._cache.open(sequence.capacity, sequence.sampling)
            except CacheFullError:
                return
            except EXITS:
                raise
            except BaseException as error:
                end_session(sequence, error, "opening")
            del self._waiting[session_id]
            if sequence.slot is not None:
                yield sequence


def _scheduled(
    sequence: SequenceT, num_computed: int, end: int, is_prefill: bool
) -> Scheduled[SequenceT]:
    """Return a sequence with its tokens ``[num_computed, end)``, and with what it checks."""
    tokens = sequence.tokens
    is_last = end == len(tokens)
    checked = sequence.begin_batch() if is_last else ()
    chunk = [*tokens[num_computed:end], *checked]
    if not (is_prefill and sequence.has_prompt_logprobs):
        return Scheduled(sequence, chunk, len(checked) + 1 if is_last else 0, is_prefill)
    known = tokens[num_computed + 1 : end + 1]
    targets = (*known, *[NO_TOKEN] * (len(chunk) - len(known)))
    return Scheduled(sequence, chunk, len(chunk), is_prefill, targets)


class _PrefillBudget:
    """The prompt tokens of one batch: how many may still come, and what is computed already."""

    def __init__(self, num_tokens: int) -> None:
        self.num_left = num_tokens
        self._computing: list[list[int]] = []

    def take(self, tokens: list[int], start: int, end: int) -> int:
        """Take a chunk of ``tokens``, of ``[start, end)`` at most; return where it ends."""
        end = min(end, start + self.num_left)
        self.num_left -= end - start
        self._computing.append(tokens[:end])
        return end

    def is_computing(self, tokens: list[int], num_computed: int) -> bool:
        """Whether another sequence's chunk is a prefix that is worth waiting for."""
        least = num_computed + MIN_CACHED
        if len(tokens) <= least:
            return False
        wanted = tokens[:-1]
        return any(common_prefix(other, wanted) >= least for other in self._computing)


def divide(seconds: float, num_tokens: list[int]) -> list[float]:
    """Divide the time of a batch by the tokens that each sequence brought to it, [sequences]."""
    total = sum(num_tokens)
    return [seconds * num / total for num in num_tokens]
