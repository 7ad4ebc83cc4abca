"""Branches of a session: continuations for the likeliest other outcomes, drafted in spare places.

Rules of this file
- A session's own run always comes first. Branches take places of a batch that no run needs.
- A branch sequence drafts one branch at a time, in KV cache of its own. It keeps what its last
  branch shares with the next one, the run up to the first of the two, and computes only the rest.
- Which branches are drafted, and when they are sent, is up to the branch plan. A rollback ends the
  branches that are being drafted.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from amusd.engine.interface import NO_TOKEN, Engine
from amusd.policy.branch_plan import BranchCounts, BranchPlan
from amusd.policy.branch_selection import Candidate, Choice
from amusd.protocol.draft_session import DraftSession
from amusd.protocol.errors import CacheFullError
from amusd.protocol.events import Branch
from amusd.serving.scheduler import Scheduled
from amusd.serving.sequence import BatchClock, Sequence
from draft_service.drafters import Proposer

_MAX_CHUNK = 16  # tokens that a branch sequence computes in one batch
_MIN_REUSED = 32  # tokens of another sequence that are worth copying


@dataclass(slots=True, eq=False, kw_only=True)
class BranchSequence(Sequence):
    """Drafts one branch after the other, in a slot of the KV cache of its own."""

    brancher: "Brancher"
    branch: Candidate | None = None
    """The branch that is drafted; None: none."""
    num_shared: int = 0
    """How many tokens in its KV cache are those of the session's run."""
    start: int = 0
    """Position of the first of ``pending``."""
    pending: list[int] = field(default_factory=list)
    """Tokens of the branch to compute: those behind ``num_shared`` at first, then the next one."""

    @property
    def owner(self) -> Sequence:
        """The sequence of the session that it drafts for."""
        return self.brancher.owner

    @property
    def tokens(self) -> list[int]:
        """The tokens to compute."""
        return self.pending

    @property
    def is_due(self) -> bool:
        """Whether there is a branch to draft."""
        return self.branch is not None


class Brancher:
    """The branches of one draft session, drafted by up to ``num_sequences`` branch sequences."""

    def __init__(
        self,
        engine: Engine,
        owner: Sequence,
        session: DraftSession,
        num_sequences: int,
        counts: BranchCounts,
    ) -> None:
        """Draft branches beside ``session``, which ``owner`` drafts; add to ``counts``."""
        self.owner = owner
        self.plan = BranchPlan(session, counts)
        self._engine = engine
        self._session = session
        self._num_sequences = num_sequences
        self._sequences: list[BranchSequence] = []

    def wrote(self, position: int, slot: int, proposers: Iterable[Proposer]) -> None:
        """Take what the model could have written at ``position`` of the session's run.

        Where a proposer knows how it goes on, there is a branch at once.
        """
        choice, session = self._choice(slot), self._session
        room = session.branch_room(position)
        for proposer in proposers if room else ():
            for token in choice.alternatives:
                found = proposer.branch(
                    self.owner.session_id, session.tokens, position, token, room
                )
                if found:
                    session.branch(Branch(position, token, tuple(found), proposer.source))
                    choice = choice.without(token)
        self.plan.wrote(position, choice)

    def schedule(self, num_places: int) -> Iterator[Scheduled[BranchSequence]]:
        """Yield what at most ``num_places`` branch sequences bring to the next batch."""
        if self._session.is_stalled:
            return
        self.plan.num_unsent_steps += 1
        for sequence in self._usable(num_places):
            branch = sequence.branch
            if branch is not None and not self.plan.goes_on(branch):
                sequence.branch = None
            if sequence.branch is None and not self._assign(sequence):
                continue
            assert sequence.slot is not None
            done = self._engine.length(sequence.slot) - sequence.start
            chunk = sequence.pending[done : done + _MAX_CHUNK]
            is_whole = done + len(chunk) == len(sequence.pending)
            yield Scheduled(sequence, chunk, int(is_whole), False)

    def settle(self, sequence: BranchSequence, token: int) -> None:
        """Take the next token of a branch."""
        branch, slot = sequence.branch, sequence.slot
        if branch is None:
            return  # its branch ended while it was drafted
        assert slot is not None
        if token == NO_TOKEN:
            self._engine.truncate(slot, 0)  # nothing of it is worth reuse
            sequence.branch, sequence.num_shared = None, 0
            return
        sequence.start += len(sequence.pending)
        sequence.pending = [token]
        sequence.branch = self.plan.grew(branch, token, self._choice(slot))

    def before_rollback(self, position: int, token: int) -> None:
        """End all branches, but give the session what is drafted for this outcome."""
        for sequence in self._sequences:
            sequence.branch = None
            sequence.num_shared = min(sequence.num_shared, position)
        self.plan.before_rollback(position, token)

    def close(self) -> None:
        """Free the memory of all branch sequences."""
        for sequence in self._sequences:
            assert sequence.slot is not None
            self._engine.close(sequence.slot)
        self._sequences.clear()
        self._num_sequences = 0

    def _usable(self, num_places: int) -> Iterator[BranchSequence]:
        """Yield branch sequences, those with a branch first; open further ones as needed."""
        self._drop_failed()
        sequences = sorted(self._sequences, key=lambda sequence: not sequence.is_due)
        yield from sequences[:num_places]
        while len(self._sequences) < min(num_places, self._num_sequences):
            try:
                slot = self._engine.open(self.owner.capacity, self.owner.sampling)
            except CacheFullError:
                self._num_sequences = len(self._sequences)
                return
            sequence = BranchSequence(
                session_id=f"{self.owner.session_id} (branch)",
                num_prompt_tokens=0,
                capacity=self.owner.capacity,
                send=_ignore,
                clock=BatchClock(),
                sampling=self.owner.sampling,
                slot=slot,
                brancher=self,
            )
            self._sequences.append(sequence)
            yield sequence

    def _drop_failed(self) -> None:
        """Draft no further branches with a sequence whose pass failed."""
        for sequence in [one for one in self._sequences if one.has_failed]:
            assert sequence.slot is not None
            self._engine.close(sequence.slot)
            self._sequences.remove(sequence)
            self._num_sequences -= 1

    def _assign(self, sequence: BranchSequence) -> bool:
        """Assign the next branch to a sequence; return whether there is one."""
        branch, slot = self.plan.next_branch(), sequence.slot
        if branch is None:
            return False
        assert slot is not None
        run, position = self._session.tokens, branch.position
        shared = min(sequence.num_shared, position, self._engine.length(slot))
        self._engine.truncate(slot, shared)
        if position - shared >= _MIN_REUSED:
            shared += self._engine.reuse(slot, run[:position])
        sequence.start = shared
        sequence.pending = [*run[shared:position], branch.token, *self.plan.tokens_of(branch)]
        sequence.num_shared = position
        sequence.branch = branch
        return True

    def _choice(self, slot: int) -> Choice:
        """Return what the model could have written in its last batch."""
        engine = self._engine
        return Choice(tuple(engine.alternatives(slot)), tuple(engine.probabilities(slot)))


def _ignore(message: object) -> None:
    """Branch sequences send nothing: branches go with the session's proposals."""
