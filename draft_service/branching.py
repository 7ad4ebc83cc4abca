"""Branches of a session: continuations for the likeliest other outcomes, drafted in spare places.

Rules of this file
- A session's own run always comes first. Branches take places of a batch that no run needs.
- A lane drafts one branch at a time, in KV cache of its own. It keeps the tokens that its last
  branch shares with the next one, so a new branch computes only the tokens between.
- A rollback ends the branches that lanes are drafting. Of the branch for its outcome, the tokens
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

_MAX_CHUNK = 64  # tokens that a lane computes in one batch


@dataclass(slots=True, eq=False, kw_only=True)
class Lane(Sequence):
    """A place for one branch: its own tokens, and a slot in the KV cache."""

    brancher: "Brancher"
    context: list[int] = field(default_factory=list)
    """The tokens to compute: the run up to the branch, its token, and what was drafted."""
    position: int | None = None
    """Where the branch hangs; None: the lane drafts none."""
    alternatives: list[tuple[int, ...]] = field(default_factory=list)
    """The next-best tokens beside each token of the branch."""

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
    """The branches of one draft session, drafted by up to ``num_lanes`` lanes."""

    def __init__(
        self, engine: Engine, session: DraftSession, capacity: int, num_lanes: int, depth: int
    ) -> None:
        """Draft branches of up to ``depth`` tokens beside ``session``."""
        self._engine = engine
        self._session = session
        self._capacity = capacity
        self._depth = depth
        self._num_lanes = num_lanes
        self._lanes: list[Lane] = []
        self._alternatives: dict[int, tuple[int, ...]] = {}  # by position, best first
        # What lies beside the tokens of the branches of this epoch, by outcome.
        self._beside: dict[tuple[int, int], list[tuple[int, ...]]] = {}

    def wrote(self, position: int, alternatives: tuple[int, ...]) -> None:
        """Take the next-best tokens beside the token that the session's run has at ``position``."""
        self._alternatives[position] = alternatives

    def schedule(self, num_places: int) -> Iterator[Scheduled[Lane]]:
        """Yield at most ``num_places`` lanes for the next batch, with their tokens."""
        self._forget_decided()
        for lane in self._usable(num_places):
            if not lane.is_due and not self._assign(lane):
                return
            assert lane.slot is not None
            start = self._engine.length(lane.slot)
            chunk = lane.context[start : start + _MAX_CHUNK]
            is_whole = start + len(chunk) == len(lane.context)
            yield Scheduled(lane, chunk, int(is_whole), False)

    def settle(self, lane: Lane, token: int) -> None:
        """Take the next token of a branch; send the branch when it is long enough."""
        position = lane.position
        if position is None:
            return  # its branch ended while it was drafted
        assert lane.slot is not None
        if token == NO_TOKEN:
            self._engine.truncate(lane.slot, 0)  # nothing of it is worth reuse
            lane.position = None
            return
        lane.context.append(token)
        lane.alternatives.append(tuple(self._engine.alternatives(lane.slot)))
        if len(lane.drafted) >= self._depth_at(position):
            self._finish(lane)

    def before_rollback(self, position: int, token: int) -> None:
        """Keep what is drafted for the outcome of a rollback, and end all other branches."""
        for lane in self._lanes:
            if lane.root == (position, token) and lane.drafted:
                self._finish(lane)
            lane.position = None
        beside = self._beside.get((position, token), [])
        self._alternatives = dict(enumerate(beside, position + 1))
        self._beside.clear()

    def close(self) -> None:
        """Free the memory of all lanes."""
        for lane in self._lanes:
            assert lane.slot is not None
            self._engine.close(lane.slot)
        self._lanes.clear()
        self._num_lanes = 0

    def _usable(self, num_places: int) -> Iterator[Lane]:
        """Yield lanes, those with a branch first; open further ones as they are needed."""
        self._drop_failed()
        lanes = sorted(self._lanes, key=lambda lane: not lane.is_due)
        yield from lanes[:num_places]
        while len(self._lanes) < min(num_places, self._num_lanes):
            try:
                slot = self._engine.open(self._capacity)
            except CacheFullError:
                self._num_lanes = len(self._lanes)
                return
            lane = Lane(
                session_id="branch",
                num_prompt_tokens=0,
                capacity=self._capacity,
                send=_ignore,
                clock=BatchClock(),
                slot=slot,
                brancher=self,
            )
            self._lanes.append(lane)
            yield lane

    def _drop_failed(self) -> None:
        """Draft no further branches with a lane whose pass failed."""
        for lane in [one for one in self._lanes if one.has_failed]:
            assert lane.slot is not None
            self._engine.close(lane.slot)
            self._lanes.remove(lane)
            self._num_lanes -= 1

    def _assign(self, lane: Lane) -> bool:
        """Let a lane draft the branch that is most worth it; return whether there is one."""
        found = best_candidate(self._candidates())
        if found is None:
            return False
        position, token = found.position, found.token
        tokens = [*self._session.tokens[:position], token]
        shared = min(common_prefix(lane.context, tokens), len(tokens) - 1)
        assert lane.slot is not None
        self._engine.truncate(lane.slot, min(shared, self._engine.length(lane.slot)))
        self._engine.reuse(lane.slot, tokens)
        lane.context, lane.position, lane.alternatives = tokens, position, []
        self._beside[position, token] = lane.alternatives
        return True

    def _candidates(self) -> Iterator[Candidate]:
        verified = self._session.verified_position
        for position, alternatives in self._alternatives.items():
            if not self._depth_at(position):
                continue
            for rank, token in enumerate(alternatives):
                if (position, token) not in self._beside:
                    yield Candidate(position, token, position - verified, rank)
                    break

    def _depth_at(self, position: int) -> int:
        """Return how many tokens a branch at ``position`` may have."""
        return min(self._depth, self._session.branch_room(position))

    def _finish(self, lane: Lane) -> None:
        position = lane.position
        assert position is not None
        self._session.branch(Branch(position, lane.context[position], lane.drafted))
        lane.position = None

    def _forget_decided(self) -> None:
        """Forget what hangs on tokens that are final now."""
        verified = self._session.verified_position
        if self._session.is_stalled:
            self._alternatives.clear()
        for position in [one for one in self._alternatives if one < verified]:
            del self._alternatives[position]
        for lane in self._lanes:
            if lane.position is not None and lane.position < verified:
                lane.position = None


def _ignore(message: object) -> None:
    """Lanes send nothing: their branches go with the session's proposals."""
