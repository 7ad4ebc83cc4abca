"""Laws of the scheduler under any sequence of opens, closes, batches and changes between them."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from amusd.fleet.model_description import ServiceLimits
from amusd.protocol.errors import (
    CacheFullError,
    InvalidInputError,
    LimitExceededError,
)
from amusd.serving.scheduler import Scheduled
from tests.serving.fake_serving import FakeSequence, FakeService, slot_of

MAX_DECODE_TOKENS = MIN_CACHED = 16
PROMPTS = st.tuples(st.sampled_from((0, 20, 60)), st.integers(1, 30), st.sampled_from((10, 80)))
"""Tokens that a prompt has in common with others, its own ones, and the room after them."""

NUMBERS = st.integers(0, 5)
"""Which of the open sessions an event is about."""


@dataclass
class Record:
    """What the test knows of a sequence.

    ``num_skipped`` counts the batches without it in which it was due. It was added, or last
    scheduled, with ``num_ahead`` sequences before it. ``number`` counts up as sequences are added.
    """

    sequence: FakeSequence
    number: int
    num_ahead: int
    num_skipped: int = 0
    is_waiting: bool = False

    @property
    def room(self) -> int:
        num_tokens = len(self.sequence.known) + len(self.sequence.proposed)
        return self.sequence.capacity - num_tokens


@dataclass
class Before:
    """The state before a batch: computed tokens by session, and the sequences that can run."""

    num_computed: dict[str, int] = field(default_factory=dict)
    runnable: list[FakeSequence] = field(default_factory=list)


class SchedulerMachine(RuleBasedStateMachine):
    """Does to a scheduler what services do, and checks the laws after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[str, Record] = {}
        self.num_added = 0
        self.num_cached_by_closed = 0

    @initialize(
        memory=st.integers(60, 500),
        max_sessions=st.integers(1, 8),
        max_waiting=st.integers(0, 4),
        max_batch=st.integers(1, 4),
        prefill_budget=st.integers(1, 60) | st.integers(1, 9),
        reuses_prefixes=st.booleans(),
    )
    def start(
        self,
        memory: int,
        max_sessions: int,
        max_waiting: int,
        max_batch: int,
        prefill_budget: int,
        reuses_prefixes: bool,
    ) -> None:
        self.memory, self.max_batch, self.budget = memory, max_batch, prefill_budget
        self.limits = ServiceLimits(max_sessions, 1000, 4, max_waiting)
        self.service = FakeService(memory, self.limits, max_batch, prefill_budget, reuses_prefixes)

    # Events

    @rule(prompts=st.lists(PROMPTS, min_size=1, max_size=4))
    def open(self, prompts: list[tuple[int, int, int]]) -> None:
        for num_shared, num_own, room in prompts:
            self.num_added += 1
            prompt = [*range(num_shared), *([100 + self.num_added] * num_own)]
            self.open_one(str(self.num_added), prompt, len(prompt) + room)

    def open_one(self, name: str, prompt: list[int], capacity: int) -> None:
        num_waiting = self.service.scheduler.num_waiting
        fits = self.fits(capacity) and not num_waiting
        try:
            sequence = self.service.add(name, prompt, capacity)
        except CacheFullError:
            assert num_waiting == self.limits.max_waiting
            assert not fits
        except InvalidInputError:
            assert capacity > self.memory
        except LimitExceededError:
            assert len(self.records) == self.limits.max_sessions
        else:
            assert (sequence.slot is not None) == fits
            record = Record(sequence, int(name), len(self.records), is_waiting=not fits)
            self.records[name] = record
            if fits:
                self.check_admitted([sequence])

    @rule(which=NUMBERS)
    def close(self, which: int) -> None:
        if self.records:
            self.close_one(self.pick(which).sequence.session_id)

    def close_one(self, name: str) -> None:
        self.num_cached_by_closed += self.records.pop(name).sequence.num_cached_tokens
        self.check_admitted(self.service.remove(name))

    @rule(which=NUMBERS)
    def give_up(self, which: int) -> None:
        waiting = [record for record in self.records.values() if record.is_waiting]
        if not self.records:
            return
        record = waiting[which % len(waiting)] if waiting else self.pick(which)
        had_failed, was_waiting = record.sequence.has_failed, record.is_waiting
        record.is_waiting = False
        self.check_admitted(self.service.give_up(record.sequence.session_id))
        assert record.sequence.has_failed == (had_failed or was_waiting)
        assert len(record.sequence.errors) == record.sequence.has_failed

    @rule(which=NUMBERS)
    def fail(self, which: int) -> None:
        """Fail as a session does that breaks the protocol, while it waits or later."""
        if self.records and not self.pick(which).sequence.has_failed:
            self.pick(which).sequence.fail(InvalidInputError("wrong"))

    @rule(which=NUMBERS, due=st.booleans())
    def set_due(self, which: int, due: bool) -> None:
        if self.records:
            record = self.pick(which)
            record.sequence.due = due and record.room > 0

    @rule(which=NUMBERS, num_tokens=st.integers(1, 50))
    def accept(self, which: int, num_tokens: int) -> None:
        """Add known tokens: a draft that lags behind, or an n-gram lookup."""
        if self.records:
            record = self.pick(which)
            num_tokens = min(num_tokens, record.room - 1)
            record.sequence.known.extend([200 + which] * num_tokens)

    @rule(which=NUMBERS, num_tokens=st.integers(0, 4))
    def propose(self, which: int, num_tokens: int) -> None:
        if self.records and self.pick(which).room > num_tokens:
            self.pick(which).sequence.proposed = (50,) * num_tokens

    @rule(which=NUMBERS, num_dropped=st.integers(1, 20))
    def roll_back(self, which: int, num_dropped: int) -> None:
        """Drop computed tokens behind the prompt, as a rollback of a draft does."""
        if not self.records:
            return
        sequence = self.pick(which).sequence
        length = max(sequence.num_prompt_tokens, len(sequence.known) - num_dropped)
        del sequence.known[length:]
        sequence.known[-1] = 300 + which
        if sequence.slot is not None:
            num_computed = self.service.cache.length(sequence.slot)
            self.service.cache.truncate(sequence.slot, min(num_computed, length - 1))

    @rule(num_batches=st.integers(1, 6))
    def run_batches(self, num_batches: int) -> None:
        for _ in range(num_batches):
            self.run_batch()

    def run_batch(self) -> list[Scheduled[FakeSequence]]:
        """Schedule a batch, check the laws, and put it into the KV cache."""
        before = Before(
            {
                name: self.service.cache.length(slot_of(record.sequence))
                for name, record in self.records.items()
                if record.sequence.slot is not None
            },
            self.service.scheduler.runnable(),
        )
        tokens = {name: list(record.sequence.known) for name, record in self.records.items()}
        batch = self.service.scheduler.schedule()
        self.check_batch(batch, before)
        for one in batch:
            self.settle(one, tokens[one.sequence.session_id])
        self.check_fairness(batch, before)
        return batch

    def settle(self, one: Scheduled[FakeSequence], known: list[int]) -> None:
        """Check that the batch brings the next tokens; put them into the KV cache, and go on."""
        sequence, slot, cache = one.sequence, slot_of(one.sequence), self.service.cache
        start = cache.length(slot)
        num_proposed = len(sequence.proposed) if one.num_outputs else 0
        num_known = len(one.tokens) - num_proposed
        assert one.tokens[:num_known] == known[start : start + num_known]
        assert num_known > 0
        assert (start + num_known == len(known)) == bool(one.num_outputs)
        assert one.tokens[num_known:] == list(sequence.proposed[:num_proposed])
        assert one.num_outputs == (num_proposed + 1 if one.num_outputs else 0)
        assert one.is_prefill == (start < sequence.num_prompt_tokens)
        cache.extend(slot, one.tokens, one.is_prefill)
        if one.num_outputs:
            accepted = sequence.proposed[: num_proposed // 2]
            sequence.known.extend((*accepted, 999))
            sequence.proposed = ()
            cache.truncate(slot, len(sequence.known) - 1)
            sequence.due = len(sequence.known) < sequence.capacity

    # Laws

    def check_batch(self, batch: Tokens[Scheduled[FakeSequence]], before: Before) -> None:
        scheduled = [one.sequence for one in batch]
        assert len(batch) <= self.max_batch
        assert len(set(map(id, scheduled))) == len(batch)
        assert all(one in before.runnable and one.due for one in scheduled)
        num_prefill = sum(self.num_prefill(one, before) for one in batch)
        assert num_prefill <= self.budget
        # A batch without a due sequence is full, has no budget left, or computes its prefix.
        due = [sequence for sequence in before.runnable if sequence.due]
        assert bool(due) == bool(batch)
        for sequence in due:
            if sequence in scheduled or len(batch) == self.max_batch:
                continue
            assert self.counts_as_prefill(sequence, before)
            assert num_prefill == self.budget or any(
                self.computes_prefix(other, sequence) for other in batch
            )

    def check_fairness(self, batch: Tokens[Scheduled[FakeSequence]], before: Before) -> None:
        """A due sequence is scheduled as soon as those that stood before it were."""
        scheduled = {one.sequence.session_id for one in batch}
        was_due = {one.session_id for one in before.runnable if one.due} | scheduled
        for name, record in self.records.items():
            if name in scheduled:
                record.num_skipped, record.num_ahead = 0, len(self.records) - 1
            elif name in was_due:
                record.num_skipped += 1
                assert record.num_skipped <= record.num_ahead

    def check_admitted(self, admitted: list[FakeSequence]) -> None:
        """Sequences get memory in the order in which they were added."""
        numbers = [self.records[one.session_id].number for one in admitted]
        assert numbers == sorted(numbers)
        for sequence in admitted:
            assert sequence.slot is not None
            self.records[sequence.session_id].is_waiting = False
        waiting = [record.number for record in self.records.values() if record.is_waiting]
        assert not waiting or not numbers or max(numbers) < min(waiting)

    @invariant()
    @precondition(lambda self: hasattr(self, "service"))
    def nothing_is_forgotten(self) -> None:
        scheduler = self.service.scheduler
        self.service.check_integrity()
        for name, record in self.records.items():
            assert scheduler.get(name) is record.sequence
            assert (
                record.is_waiting
                or record.sequence.slot is not None
                or (record.sequence.has_failed)
            )
        waiting = [record for record in self.records.values() if record.is_waiting]
        assert scheduler.num_waiting == len(waiting) <= self.limits.max_waiting
        with_memory = [one for one in self.records.values() if one.sequence.slot is not None]
        assert scheduler.num_open == len(with_memory)
        assert len(self.records) <= self.limits.max_sessions

    @invariant()
    @precondition(lambda self: hasattr(self, "service"))
    def cached_tokens_are_counted(self) -> None:
        by_open = sum(record.sequence.num_cached_tokens for record in self.records.values())
        assert self.service.cache.usage.num_cached == by_open + self.num_cached_by_closed

    @invariant()
    @precondition(lambda self: hasattr(self, "service"))
    def memory_is_used_and_never_too_much(self) -> None:
        held = [one.sequence for one in self.records.values() if one.sequence.slot is not None]
        assert self.service.cache.usage.num_reserved == sum(one.capacity for one in held)
        assert self.service.cache.usage.num_reserved <= self.memory
        waiting = [record for record in self.records.values() if record.is_waiting]
        if waiting:
            first = min(waiting, key=lambda record: record.number)
            assert not self.fits(first.sequence.capacity)

    def teardown(self) -> None:
        """Every sequence gets memory and has its tokens computed; in the end nothing is left."""
        for name in list(self.records):
            self.close_one(name)
            self.compute_all()
        if self.num_added:
            assert self.service.counts == (0, 0)
            assert self.service.cache.usage.num_reserved == 0

    # Helpers

    def compute_all(self) -> None:
        """Run batches until each sequence that can run has an output; their number is bounded."""
        todo = {
            one.session_id
            for one in self.service.scheduler.runnable()
            if self.records[one.session_id].room > 0
        }
        num_tokens = sum(len(self.records[name].sequence.known) for name in todo)
        for _ in range(num_tokens):
            for name, record in self.records.items():
                record.sequence.due = name in todo
            # Each batch computes at least one of the tokens.
            todo -= {one.sequence.session_id for one in self.run_batch() if one.num_outputs}
        assert not todo

    def pick(self, which: int) -> Record:
        return list(self.records.values())[which % len(self.records)]

    def fits(self, capacity: int) -> bool:
        return self.service.cache.usage.num_reserved + capacity <= self.memory

    def counts_as_prefill(self, sequence: FakeSequence, before: Before) -> bool:
        num_computed = before.num_computed[sequence.session_id]
        num_left = len(sequence.known) - num_computed
        most = min(MAX_DECODE_TOKENS, self.budget)
        return num_computed < sequence.num_prompt_tokens or num_left > most

    def num_prefill(self, one: Scheduled[FakeSequence], before: Before) -> int:
        """Return how much of the prefill budget a scheduled sequence takes."""
        if not self.counts_as_prefill(one.sequence, before):
            return 0
        return len(one.tokens) - max(0, one.num_outputs - 1)

    def computes_prefix(self, one: Scheduled[FakeSequence], waiting: FakeSequence) -> bool:
        """Whether ``one`` computes at least 16 tokens that ``waiting`` can copy afterwards."""
        cache = self.service.cache
        end = cache.length(slot_of(one.sequence)) + len(one.tokens)
        num_wanted = cache.length(slot_of(waiting)) + MIN_CACHED
        return num_wanted <= end and (waiting.known[:num_wanted] == one.sequence.known[:num_wanted])


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
