"""Drafters: what writes the proposals. All work on the engine thread, on lists of token ids."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from amusd.engine.interface import Engine, ScheduledSequence
from amusd.fleet.model_description import PROMPT_LOOKUP, CacheUsage, ModelDescription
from amusd.fleet.vocabulary import Vocabulary
from amusd.protocol.draft_source import ALL_SOURCES, DraftSource
from amusd.protocol.errors import AmusdError
from amusd.serving.chunked_prefill import PromptReader, run_pass
from draft_service.match_index import MatchIndex

_MAX_MATCH = 4


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """The tokens of one session, and how many may be drafted after them.

    ``sources`` are those that may draft; a drafter with a single source need not ask. The first
    ``num_prompt`` tokens are the session's prompt.
    """

    slot: int
    tokens: list[int]
    room: int
    sources: frozenset[DraftSource] = ALL_SOURCES
    num_prompt: int = 0


@dataclass(frozen=True, slots=True)
class Drafted:
    """The next tokens of one session, all of one source; none: there is nothing to propose.

    The model read ``num_computed`` tokens for them.
    """

    source: DraftSource
    tokens: tuple[int, ...]
    num_computed: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Reading:
    """The model read ``num_computed`` tokens of a session's prompt, and has more to read."""

    num_computed: int = field(default=0, compare=False)


Outcome = Drafted | Reading | AmusdError | None
"""What became of a request; an error: its step failed; None: it had no turn, ask again first."""


class Drafter(Protocol):
    """Writes the next tokens of sessions, each in a slot of its own."""

    @property
    def description(self) -> ModelDescription:
        """The model that drafts."""

    @property
    def sources(self) -> frozenset[DraftSource]:
        """Where its tokens may come from."""

    @property
    def usage(self) -> CacheUsage:
        """How much memory for keys and values is in use."""

    def open(self, capacity: int) -> int:
        """Return a new slot for at most ``capacity`` tokens.

        Raises:
            CacheFullError: no memory is left for it now.
        """

    def draft(self, requests: Sequence[DraftRequest]) -> list[Outcome]:
        """Take one step over as many requests as it can, from the first; say what became of each.

        A long prompt is read in pieces, so many tokens a step over all requests.
        """

    def truncate(self, slot: int, length: int) -> None:
        """Forget what the slot holds beyond ``length`` tokens, in constant time."""

    def close(self, slot: int) -> None:
        """Free the slot."""


class ModelDrafter:
    """Drafts one token a step with a language model."""

    sources = frozenset((DraftSource.MODEL,))

    def __init__(self, engine: Engine, prefill_tokens: int, reuse_prefixes: bool = True) -> None:
        """Draft with ``engine``, reading at most ``prefill_tokens`` of prompts a step."""
        self._engine = engine
        self._prefill_tokens = prefill_tokens
        self._reader = PromptReader(engine, prefill_tokens, reuse_prefixes)

    @property
    def description(self) -> ModelDescription:
        """The model that drafts."""
        return self._engine.description

    @property
    def usage(self) -> CacheUsage:
        """How much memory of the engine is in use."""
        return self._engine.usage

    def open(self, capacity: int) -> int:
        """Return a new slot of the engine."""
        return self._engine.open(capacity)

    def is_behind(self, request: DraftRequest) -> bool:
        """Whether there is more to read than one step does."""
        return len(request.tokens) - self._engine.length(request.slot) > self._prefill_tokens

    def draft(self, requests: Sequence[DraftRequest]) -> list[Outcome]:
        """Run one step over as many requests as the engine takes."""
        outcomes: list[Outcome] = [None] * len(requests)
        feeds: dict[int, ScheduledSequence] = {}
        self._reader.begin_pass()
        for index, request in enumerate(requests):
            if len(feeds) == self._engine.max_batch:
                break
            feed = self._feed(request)
            if feed is not None:
                feeds[index] = feed
        for index, outcome in zip(feeds, self._run(list(feeds.values())), strict=True):
            outcomes[index] = outcome
        return outcomes

    def truncate(self, slot: int, length: int) -> None:
        """Forget what the slot holds beyond ``length`` tokens."""
        if self._engine.length(slot) > length:
            self._engine.truncate(slot, length)

    def close(self, slot: int) -> None:
        """Free the slot."""
        self._engine.close(slot)

    def _feed(self, request: DraftRequest) -> ScheduledSequence | None:
        piece = self._reader.next_piece(request.slot, request.tokens, request.num_prompt)
        if not piece.tokens:
            return None
        return ScheduledSequence(
            request.slot, piece.tokens, 1 if piece.is_last else 0, piece.is_prompt
        )

    def _run(self, feeds: list[ScheduledSequence]) -> list[Outcome]:
        if not feeds:
            return []
        try:
            outputs = run_pass(self._engine, feeds)
        except AmusdError as error:
            return [error] * len(feeds)
        return [
            Drafted(DraftSource.MODEL, tuple(tokens), len(feed.tokens))
            if feed.num_outputs
            else Reading(len(feed.tokens))
            for feed, tokens in zip(feeds, outputs, strict=True)
        ]


class PromptLookupDrafter:
    """Proposes what followed the last tokens where they occurred before; needs no weights.

    The longest match counts, of the last ``max_match`` down to ``min_match`` tokens, and among
    equal ones the latest (Saxena, Prompt Lookup Decoding, 2023).
    """

    sources = frozenset((DraftSource.LOOKUP,))
    usage = CacheUsage(max_tokens=0)

    def __init__(
        self, max_match: int = _MAX_MATCH, min_match: int = 2, context_length: int = 1 << 20
    ) -> None:
        """Look for matches of ``min_match`` to ``max_match`` tokens."""
        self._max_match = max_match
        self._min_match = min_match
        self._next_slot = 0
        self._indices: dict[int, MatchIndex] = {}
        self.description = ModelDescription(
            name=PROMPT_LOOKUP,
            device="cpu",
            dtype="none",
            num_parameters=0,
            context_length=context_length,
            output_size=0,
            vocabulary=Vocabulary(0),
        )

    def open(self, capacity: int) -> int:
        """Return a new slot; ``capacity`` does not matter here."""
        self._next_slot += 1
        self._indices[self._next_slot] = MatchIndex(self._min_match, self._max_match)
        return self._next_slot

    def draft(self, requests: Sequence[DraftRequest]) -> list[Outcome]:
        """Look up each request; at most ``room`` tokens each."""
        found = [
            self._indices[request.slot].continuation(request.tokens, request.room)
            for request in requests
        ]
        return [Drafted(DraftSource.LOOKUP, tuple(tokens)) for tokens in found]

    def truncate(self, slot: int, length: int) -> None:
        """Forget what was seen beyond ``length`` tokens."""
        self._indices[slot].truncate(length)

    def close(self, slot: int) -> None:
        """Free the slot."""
        del self._indices[slot]


class HybridDrafter:
    """Proposes what followed the last 3 or more tokens before, else drafts with a model.

    A slot is the model's, with an index beside it. The model does not see what the look-up
    proposes before it is asked again; it then reads all of that in the same step.
    """

    sources = ALL_SOURCES

    def __init__(
        self, model: ModelDrafter, max_match: int = _MAX_MATCH, min_match: int = 3
    ) -> None:
        """Look for matches of ``min_match`` to ``max_match`` tokens before asking ``model``."""
        self._model = model
        self._max_match = max_match
        self._min_match = min_match
        self._indices: dict[int, MatchIndex] = {}

    @property
    def description(self) -> ModelDescription:
        """The model that drafts."""
        return self._model.description

    @property
    def usage(self) -> CacheUsage:
        """How much memory of the model's engine is in use."""
        return self._model.usage

    def open(self, capacity: int) -> int:
        """Return a new slot for both."""
        slot = self._model.open(capacity)
        self._indices[slot] = MatchIndex(self._min_match, self._max_match)
        return slot

    def draft(self, requests: Sequence[DraftRequest]) -> list[Outcome]:
        """Look up each request, and run one step of the model over those that need it."""
        found = [self._without_model(request) for request in requests]
        asking = [
            request for request, answer in zip(requests, found, strict=True) if answer is None
        ]
        steps = iter(self._model.draft(asking))
        return [next(steps) if answer is None else answer for answer in found]

    def truncate(self, slot: int, length: int) -> None:
        """Forget what either holds beyond ``length`` tokens."""
        self._model.truncate(slot, length)
        self._indices[slot].truncate(length)

    def close(self, slot: int) -> None:
        """Free the slot."""
        self._model.close(slot)
        del self._indices[slot]

    def _without_model(self, request: DraftRequest) -> Drafted | None:
        """Return the answer to a request that needs no step of the model, else None."""
        has_model = DraftSource.MODEL in request.sources
        # A prompt is read while the verify model reads it; later there would be no time for it.
        if has_model and self._model.is_behind(request):
            return None
        tokens: list[int] = []
        if DraftSource.LOOKUP in request.sources:
            tokens = self._indices[request.slot].continuation(request.tokens, request.room)
        if not tokens and has_model:
            return None
        return Drafted(DraftSource.LOOKUP, tuple(tokens))
