"""Branches of a session: continuations for the likeliest other outcomes, drafted in spare places.

Rules of this file
- A session's own run always comes first. Branches take places of a batch that no run needs.
- A branch sequence drafts one branch at a time, in KV cache of its own. It keeps what its last
  branch shares with the next one, the run up to the first of the two, and computes only the rest.
- The next token to draft is the one that is likeliest of use, of all branches. A branch that has to
  give its sequence to another one is drafted further when its turn comes.
- Every token of a branch can be used at once: by the verify service if it was sent, and else by
  the session after the rollback. A rollback ends the branches that are being drafted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from amusd.engine.interface import NO_TOKEN, Engine
from amusd.policy.branch_selection import BranchSelection, Candidate, Choice
from amusd.protocol.draft_session import DraftSession
from amusd.protocol.errors import CacheFullError
from amusd.protocol.events import Branch
from amusd.serving.scheduler import Scheduled
from amusd.serving.sequence import BatchClock, Sequence

_MAX_CHUNK = 16  # tokens that a branch sequence computes in one batch
_MIN_GAIN = 0.7  # a branch gives way to one that is likelier of use by this factor, exp(0.7) = 2
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


@dataclass(slots=True)
class _Drafted:
    """What is drafted of a branch, and the next-best tokens beside each token."""

    branch: Candidate
    tokens: list[int] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)


@dataclass(slots=True)
class BranchCounts:
    """Branches and their tokens that a draft service has drafted, and rollbacks that found one."""

    prepared: int = 0
    tokens: int = 0
    rollback_hits: int = 0


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
        self.num_unsent_batches = 0
        """Batches since the session sent a message; the owner sets it back."""
        self._engine = engine
        self._session = session
        self._counts = counts
        self.owner = owner
        self._num_sequences = num_sequences
        self._sequences: list[BranchSequence] = []
        self._selection = BranchSelection(session.length)
        self._taken: _Drafted | None = None  # by the rollback that is under way
        self._drafted: dict[tuple[int, int], _Drafted] = {}  # by outcome, of this epoch
        self._grown: dict[tuple[int, int], _Drafted] = {}  # those that the session does not know

    def wrote(self, position: int, slot: int) -> None:
        """Take what the model could have written at ``position`` of the session's run."""
        self._selection.add(position, self._choice(slot))

    @property
    def is_overdue(self) -> bool:
        """Whether tokens of branches should be sent, although no run is ready.

        A message for each token would cost more than it gains, as with the tokens of a run.
        """
        return bool(self._grown) and self.num_unsent_batches >= self._session.tokens_per_proposal

    def hand_over(self) -> None:
        """Give the session the branches that have grown, to be sent."""
        for drafted in self._grown.values():
            self._hand_over(drafted)
        self._grown.clear()

    def schedule(self, num_places: int) -> Iterator[Scheduled[BranchSequence]]:
        """Yield what at most ``num_places`` branch sequences bring to the next batch."""
        if self._session.is_stalled:
            return
        self.num_unsent_batches += 1
        verified = self._session.verified_position
        for sequence in self._usable(num_places):
            self._give_way(sequence, verified)
            if sequence.branch is None and not self._assign(sequence, verified):
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
        root = branch.position, branch.token
        drafted = self._drafted[root]
        self._counts.prepared += not drafted.tokens
        self._counts.tokens += 1
        drafted.tokens.append(token)
        choice = self._choice(slot)
        drafted.choices.append(choice)
        self._grown[root] = drafted
        sequence.branch = self._selection.next_of(branch, choice.probabilities[0])

    def before_rollback(self, position: int, token: int) -> None:
        """End all branches, but give the session what is drafted for this outcome."""
        for sequence in self._sequences:
            sequence.branch = None
            sequence.num_shared = min(sequence.num_shared, position)
        self._taken = self._drafted.get((position, token))
        if self._taken is not None:
            self._counts.rollback_hits += bool(self._taken.tokens)
            self._hand_over(self._taken)

    def after_rollback(self) -> None:
        """Start again, with the next-best tokens beside what the new run begins with."""
        self._drafted.clear()
        self._grown.clear()
        start = self._session.verified_position
        self._selection.restart(start)
        choices = self._taken.choices if self._taken is not None else []
        for position, choice in zip(range(start, self._session.length), choices, strict=False):
            self._selection.add(position, choice)

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
                slot = self._engine.open(self.owner.capacity)
            except CacheFullError:
                self._num_sequences = len(self._sequences)
                return
            sequence = BranchSequence(
                session_id=f"{self.owner.session_id} (branch)",
                num_prompt_tokens=0,
                capacity=self.owner.capacity,
                send=_ignore,
                clock=BatchClock(),
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

    def _choice(self, slot: int) -> Choice:
        """Return what the model could have written in its last batch."""
        engine = self._engine
        return Choice(tuple(engine.alternatives(slot)), tuple(engine.probabilities(slot)))

    def _hand_over(self, drafted: _Drafted) -> None:
        branch = drafted.branch
        if drafted.tokens:
            self._session.branch(Branch(branch.position, branch.token, tuple(drafted.tokens)))

    def _give_way(self, sequence: BranchSequence, verified: int) -> None:
        """End or put back the branch of a sequence if it is decided, or others are worth more."""
        branch = sequence.branch
        if branch is None:
            return
        if branch.position < verified or branch.depth >= self._session.branch_room(branch.position):
            sequence.branch = None
            return
        other = self._selection.best(verified)
        if branch.depth and other is not None and other.cost < branch.cost - _MIN_GAIN:
            sequence.branch = None
            self._selection.put_back(branch)

    def _assign(self, sequence: BranchSequence, verified: int) -> bool:
        """Assign the best branch to a sequence; return whether there is one."""
        branch = self._selection.best(verified)
        if branch is None or not self._selection.is_worth(branch, verified):
            return False
        self._selection.take_best()
        if not self._session.branch_room(branch.position):
            return False
        root, slot = (branch.position, branch.token), sequence.slot
        assert slot is not None
        drafted = self._drafted.setdefault(root, _Drafted(branch))
        run, position = self._session.tokens, branch.position
        shared = min(sequence.num_shared, position, self._engine.length(slot))
        self._engine.truncate(slot, shared)
        if position - shared >= _MIN_REUSED:
            shared += self._engine.reuse(slot, run[:position])
        sequence.start = shared
        sequence.pending = [*run[shared:position], branch.token, *drafted.tokens]
        sequence.num_shared = position
        sequence.branch = branch
        return True


def _ignore(message: object) -> None:
    """Branch sequences send nothing: branches go with the session's proposals."""
