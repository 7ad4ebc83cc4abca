"""What writes proposals: a draft model, proposers that need no model, or both.

All of it works on the engine thread, on lists of token ids. A new source of proposals is a
``Proposer`` in a module of its own, and an entry in ``drafter_registry``.
"""

from dataclasses import dataclass, replace
from typing import Protocol

from amusd.engine.interface import DEFAULT_OPTIONS, Engine, EngineOptions
from amusd.engine.no_model import NoModel
from amusd.protocol.draft_source import DraftSource
from draft_service.ngram_index import BYTES_PER_TOKEN, NgramIndex

MAX_UNREAD = 128
"""Tokens that a proposer reads at once when it is asked for a proposal."""

_MAX_MATCH = 4
_MIN_MATCH_ALONE = 2
_MIN_MATCH_BESIDE_MODEL = 3


class Proposer(Protocol):
    """A source of proposals that takes no time of the draft device."""

    source: DraftSource

    def read(self, session_id: str, tokens: list[int], most: int) -> int:
        """Take in at most ``most`` of a session's tokens; return how many are left.

        A long text is read in pieces between batches, so that no session waits for another's.
        """

    def propose(self, session_id: str, tokens: list[int], room: int) -> list[int]:
        """Return at most ``room`` tokens after ``tokens``, all of the session's; none: no idea."""

    def branch(
        self, session_id: str, tokens: list[int], position: int, token: int, room: int
    ) -> list[int]:
        """Return at most ``room`` tokens after ``token``, if that is the one at ``position``."""

    def truncate(self, session_id: str, length: int) -> None:
        """Forget what was seen of a session beyond ``length`` tokens."""

    def close(self, session_id: str) -> None:
        """Forget a session."""


@dataclass(frozen=True, slots=True)
class Drafter:
    """An engine, and the proposers that are asked before it, in order."""

    engine: Engine
    proposers: tuple[Proposer, ...] = ()

    @property
    def has_model(self) -> bool:
        """Whether there is a model to draft with."""
        return not isinstance(self.engine, NoModel)

    @property
    def sources(self) -> frozenset[DraftSource]:
        """Where its tokens may come from."""
        found = {proposer.source for proposer in self.proposers}
        return frozenset(found | {DraftSource.MODEL} if self.has_model else found)


class NgramProposer:
    """Proposes what followed the last tokens where they occurred before in the session.

    A text that is not read yet, except for its last tokens, has no proposals.

    The longest match counts, of the last ``max_match`` down to ``min_match`` tokens, and among
    equal ones the latest (Saxena, Prompt Lookup Decoding, 2023).
    """

    source = DraftSource.LOOKUP

    def __init__(self, min_match: int, max_match: int = _MAX_MATCH) -> None:
        """Look for matches of ``min_match`` to ``max_match`` tokens."""
        self._min_match = min_match
        self._max_match = max_match
        self._indices: dict[str, NgramIndex] = {}

    def read(self, session_id: str, tokens: list[int], most: int) -> int:
        """Index at most ``most`` more tokens of a session; return how many are left."""
        index = self._index(session_id)
        index.extend(tokens, most)
        return index.num_missing(tokens)

    def propose(self, session_id: str, tokens: list[int], room: int) -> list[int]:
        """Return what followed the last tokens before, at most ``room`` tokens."""
        index = self._index(session_id)
        if index.num_missing(tokens) > MAX_UNREAD:
            return []
        return index.continuation(tokens, room)

    def branch(
        self, session_id: str, tokens: list[int], position: int, token: int, room: int
    ) -> list[int]:
        """Return what followed ``token`` and the words before it earlier on."""
        return self._index(session_id).continuation_of(tokens, position, token, room)

    def truncate(self, session_id: str, length: int) -> None:
        """Forget what was seen beyond ``length`` tokens."""
        if session_id in self._indices:
            self._indices[session_id].truncate(length)

    def close(self, session_id: str) -> None:
        """Forget a session."""
        self._indices.pop(session_id, None)

    def _index(self, session_id: str) -> NgramIndex:
        index = self._indices.get(session_id)
        if index is None:
            index = self._indices[session_id] = NgramIndex(self._min_match, self._max_match)
        return index


def ngram_drafter(options: EngineOptions = DEFAULT_OPTIONS) -> Drafter:
    """Return a drafter without a model. The indices take the memory of the KV cache."""
    options = replace(options, index_bytes=BYTES_PER_TOKEN)
    return Drafter(NoModel(options), (NgramProposer(_MIN_MATCH_ALONE),))


def model_drafter(engine: Engine, with_ngrams: bool) -> Drafter:
    """Return a drafter with a model, and with an n-gram lookup before it if so asked.

    Beside a model a match has to be longer, for the model is right more often than a short one.
    """
    proposers = (NgramProposer(_MIN_MATCH_BESIDE_MODEL),) if with_ngrams else ()
    return Drafter(engine, proposers)
