"""Branches of a session: continuations for the likeliest other outcomes, drafted in spare places.

Rules of this file
- A session's own run always comes first. Branches take places of a batch that no run needs.
- A branch sequence drafts one branch at a time, in KV cache of its own. It keeps the tokens that
  its last branch shares with the next one, so a new branch computes only the tokens between.
- A rollback ends the branches that are being drafted. Of the branch for its outcome, the tokens
  that are there are kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from amusd.engine.interface import NO_TOKEN, Engine
from amusd.engine.kv.cache_manager import common_prefix
from amusd.policy.branch_selection import Candidate, best_candidate
from amusd.protocol.draft_session import DraftSession
from amusd.protocol.errors import CacheFullError
from amusd.protocol.events import Branch
from amusd.serving.scheduler import Scheduled
from amusd.serving.sequence import BatchClock, Sequence

_MAX_CHUNK = 16  # tokens that a branch sequence computes in one batch


@dataclass(slots=True, eq=False, kw_only=True)
class BranchSequence(Sequence):
    """Drafts one branch after the other, in a slot of the KV cache of its own."""

    brancher: "Brancher"
    context: list[int] = field(default_factory=list)
    """The tokens to compute: the run up to the branch, its token, and what was drafted."""
    position: int | None = None
    """Where the branch hangs; None: it drafts none."""
    alternatives: list[tuple[int, ...]] = field(default_factory=list)
    """The next-best tokens beside each token of the branch."""

    @property
    def owner(self) -> Sequence:
        """The sequence of the session that it drafts for."""
        return self.brancher.owner

    @property
    def tokens(self) -> list[int]:
        """The tokens to compute."""
        return self.context

    @property
    def is_due(self) -> bool:
        """Whether there is a branch to draft."""
        return self.position is not None

    @property
    def root(self) -> tuple[int, int] | None:
        """The outcome that is drafted for."""
        return None if self.position is None else (self.position, self.context[self.position])

    @property
    def drafted(self) -> tuple[int, ...]:
        """The tokens of the branch so far."""
        return () if self.position is None else tuple(self.context[self.position + 1 :])


class Brancher:
    """The branches of one draft session, drafted by up to ``num_sequences`` branch sequences."""

    def __init__(
        self, engine: Engine, owner: Sequence, session: DraftSession, num_sequences: int, depth: int
    ) -> None:
        """Draft branches of up to ``depth`` tokens beside ``session``, which ``owner`` drafts."""
        self._engine = engine
        self._session = session
        self.owner = owner
        self._depth = depth
        self._num_sequences = num_sequences
        self._sequences: list[BranchSequence] = []
        self._alternatives: dict[int, tuple[int, ...]] = {}  # by position, best first
        # The next-best tokens at each token of the branches of this epoch, by outcome.
        self._branch_alternatives: dict[tuple[int, int], list[tuple[int, ...]]] = {}

    def wrote(self, position: int, alternatives: tuple[int, ...]) -> None:
        """Take the next-best tokens beside the token that the session's run has at ``position``."""
        self._alternatives[position] = alternatives

    def schedule(self, num_places: int) -> Iterator[Scheduled[BranchSequence]]:
        """Yield what at most ``num_places`` branch sequences bring to the next batch."""
        self._forget_decided()
        for sequence in self._usable(num_places):
            if not sequence.is_due and not self._assign(sequence):
                return
            assert sequence.slot is not None
            start = self._engine.length(sequence.slot)
            chunk = sequence.context[start : start + _MAX_CHUNK]
            is_whole = start + len(chunk) == len(sequence.context)
            yield Scheduled(sequence, chunk, int(is_whole), False)

    def settle(self, sequence: BranchSequence, token: int) -> None:
        """Take the next token of a branch; send the branch when it is long enough."""
        position = sequence.position
        if position is None:
            return  # its branch ended while it was drafted
        assert sequence.slot is not None
        if token == NO_TOKEN:
            self._engine.truncate(sequence.slot, 0)  # nothing of it is worth reuse
            sequence.position = None
            return
        sequence.context.append(token)
        sequence.alternatives.append(tuple(self._engine.alternatives(sequence.slot)))
        if len(sequence.drafted) >= self._depth_at(position):
            self._finish(sequence)

    def before_rollback(self, position: int, token: int) -> None:
        """Keep what is drafted for the outcome of a rollback, and end all other branches."""
        for sequence in self._sequences:
            if sequence.root == (position, token) and sequence.drafted:
                self._finish(sequence)
            sequence.position = None
        found = self._branch_alternatives.get((position, token), [])
        self._alternatives = dict(enumerate(found, position + 1))
        self._branch_alternatives.clear()

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

    def _assign(self, sequence: BranchSequence) -> bool:
        """Assign the branch that is worth most to a sequence; return whether there is one."""
        found = best_candidate(self._candidates())
        if found is None:
            return False
        position, token = found.position, found.token
        tokens = [*self._session.tokens[:position], token]
        shared = min(common_prefix(sequence.context, tokens), len(tokens) - 1)
        assert sequence.slot is not None
        self._engine.truncate(sequence.slot, min(shared, self._engine.length(sequence.slot)))
        self._engine.reuse(sequence.slot, tokens)
        sequence.context, sequence.position, sequence.alternatives = tokens, position, []
        self._branch_alternatives[position, token] = sequence.alternatives
        return True

    def _candidates(self) -> Iterator[Candidate]:
        verified = self._session.verified_position
        for position, alternatives in self._alternatives.items():
            # A branch that the session did not hold has left alternatives beyond the run.
            if position >= self._session.length or not self._depth_at(position):
                continue
            for rank, token in enumerate(alternatives):
                if (position, token) not in self._branch_alternatives:
                    yield Candidate(position, token, position - verified, rank)
                    break

    def _depth_at(self, position: int) -> int:
        """Return how many tokens a branch at ``position`` may have."""
        return min(self._depth, self._session.branch_room(position))

    def _finish(self, sequence: BranchSequence) -> None:
        position = sequence.position
        assert position is not None
        self._session.branch(Branch(position, sequence.context[position], sequence.drafted))
        sequence.position = None

    def _forget_decided(self) -> None:
        """Forget what hangs on tokens that are final now."""
        verified = self._session.verified_position
        if self._session.is_stalled:
            self._alternatives.clear()
        for position in [one for one in self._alternatives if one < verified]:
            del self._alternatives[position]
        for sequence in self._sequences:
            if sequence.position is not None and sequence.position < verified:
                sequence.position = None


def _ignore(message: object) -> None:
    """Branch sequences send nothing: branches go with the session's proposals."""
