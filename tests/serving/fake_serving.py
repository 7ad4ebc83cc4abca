"""A scheduler with a KV cache and sequences of a service that computes nothing."""

from dataclasses import dataclass, field

from amusd.engine.kv.cache_manager import KVCacheManager
from amusd.fleet.model_description import ServiceLimits
from amusd.protocol.errors import AmusdError
from amusd.sampling.parameters import GREEDY, SequenceSampling
from amusd.serving.scheduler import Scheduled, Scheduler
from amusd.serving.sequence import BatchClock, Sequence

CONTEXT = 1000
NEXT = 999
LIMITS = ServiceLimits(max_sessions=5, max_context=CONTEXT, max_lookahead=4, max_waiting=2)


@dataclass(frozen=True)
class FakeOpening:
    """What a session is opened with."""

    session_id: str
    tokens: list[int]
    capacity: int = 200


@dataclass(slots=True, eq=False, kw_only=True)
class FakeSequence(Sequence):
    """A sequence that is due whenever the test says so, and records the errors it is sent."""

    known: list[int]
    proposed: tuple[int, ...] = ()
    due: bool = True
    errors: list[AmusdError] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.known

    @property
    def is_due(self) -> bool:
        return self.due

    def begin_batch(self) -> tuple[int, ...]:
        return self.proposed


def make_sequence(
    name: str,
    prompt: list[int],
    capacity: int,
    proposed: tuple[int, ...] = (),
    sampling: SequenceSampling = GREEDY,
) -> FakeSequence:
    errors: list[AmusdError] = []
    return FakeSequence(
        session_id=name,
        num_prompt_tokens=len(prompt),
        capacity=capacity,
        send=errors.append,
        clock=BatchClock(),
        sampling=sampling,
        known=list(prompt),
        proposed=proposed,
        errors=errors,
    )


class FakeCache(KVCacheManager[list[int]]):
    """A KV cache that records the sampling of each slot, as an engine does."""

    samplings: dict[int, SequenceSampling]

    def open(self, capacity: int, sampling: SequenceSampling = GREEDY) -> int:
        slot = super().open(capacity)
        self.samplings[slot] = sampling
        return slot


class FakeService:
    """Sequences, their scheduler, and a KV cache that takes the tokens of each batch.

    The model writes ``NEXT`` after every text, and no proposed token is right.
    """

    def __init__(
        self,
        memory: int = 1 << 20,
        limits: ServiceLimits = LIMITS,
        max_batch: int = 8,
        prefill_budget: int = 100,
        reuses_prefixes: bool = True,
    ) -> None:
        self.cache = FakeCache(
            memory,
            CONTEXT,
            allocate=lambda capacity: [],
            copy=(lambda donor, target, length: None) if reuses_prefixes else None,
        )
        self.cache.samplings = {}
        self.scheduler: Scheduler[FakeSequence] = Scheduler(
            self.cache, limits, max_batch, prefill_budget, reuses_prefixes
        )

    @property
    def counts(self) -> tuple[int, int]:
        """Number of open and of waiting sequences."""
        return self.scheduler.num_open, self.scheduler.num_waiting

    def add(
        self,
        name: str,
        prompt: list[int] | None = None,
        capacity: int = 500,
        proposed: tuple[int, ...] = (),
        sampling: SequenceSampling = GREEDY,
    ) -> FakeSequence:
        tokens = [1] if prompt is None else prompt
        sequence = make_sequence(name, tokens, capacity, proposed, sampling)
        self.scheduler.check_new(name)
        self.scheduler.add(sequence)
        self.check_integrity()
        return sequence

    def remove(self, name: str) -> list[FakeSequence]:
        admitted = self.scheduler.remove(name)
        self.check_integrity()
        return admitted

    def give_up(self, name: str) -> list[FakeSequence]:
        admitted = self.scheduler.give_up(name)
        self.check_integrity()
        return admitted

    def check_integrity(self) -> None:
        self.scheduler.check_integrity()
        self.cache.check_integrity()

    def run_batch(self) -> list[Scheduled[FakeSequence]]:
        """Schedule the next batch, put its tokens into the KV cache, and take its outputs."""
        batch = self.scheduler.schedule()
        self.check_integrity()
        for one in batch:
            sequence, slot = one.sequence, slot_of(one.sequence)
            self.cache.extend(slot, one.tokens, one.is_prefill)
            if one.num_outputs:
                self.cache.truncate(slot, len(sequence.known))
                sequence.known.append(NEXT)
        return batch

    def compute(self, sequence: FakeSequence) -> None:
        """Put all tokens of a sequence into the KV cache, without a batch."""
        slot = slot_of(sequence)
        self.cache.extend(slot, sequence.known[self.cache.length(slot) :])

    def num_scheduled(self) -> dict[str, int]:
        """Run a batch; return its number of tokens by session."""
        return {one.sequence.session_id: len(one.tokens) for one in self.run_batch()}


def slot_of(sequence: FakeSequence) -> int:
    assert sequence.slot is not None
    return sequence.slot
