"""Drafters: what writes the proposals. All work on the engine thread, on lists of token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from amusd.core.model import PROMPT_LOOKUP, ModelDescription
from amusd.core.vocabulary import Vocabulary
from amusd.engine.interface import Engine, Feed


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """The tokens of one session, and how many may be drafted after them."""

    slot: int
    tokens: list[int]
    room: int


class Drafter(Protocol):
    """Writes the next tokens of sessions, each in a slot of its own."""

    @property
    def description(self) -> ModelDescription:
        """The model that drafts."""

    @property
    def max_batch(self) -> int:
        """Most requests of one call."""

    def open(self, capacity: int) -> int:
        """Return a new slot for at most ``capacity`` tokens."""

    def draft(self, requests: Sequence[DraftRequest]) -> list[tuple[int, ...] | None]:
        """Return the next tokens of each request.

        An empty tuple: there is nothing to propose. None: not yet, ask again (a long prompt
        is read in pieces).
        """

    def truncate(self, slot: int, length: int) -> None:
        """Forget what the slot holds beyond ``length`` tokens, in constant time."""

    def close(self, slot: int) -> None:
        """Free the slot."""


class ModelDrafter:
    """Drafts one token a step with a language model."""

    def __init__(self, engine: Engine, prefill_tokens: int) -> None:
        """Draft with ``engine``, reading at most ``prefill_tokens`` of a prompt a step."""
        self._engine = engine
        self._prefill_tokens = prefill_tokens

    @property
    def description(self) -> ModelDescription:
        """The model that drafts."""
        return self._engine.description

    @property
    def max_batch(self) -> int:
        """Most requests of one step."""
        return self._engine.max_batch

    def open(self, capacity: int) -> int:
        """Return a new slot of the engine."""
        return self._engine.open(capacity)

    def draft(self, requests: Sequence[DraftRequest]) -> list[tuple[int, ...] | None]:
        """Run one step over all requests."""
        feeds = [self._feed(request) for request in requests]
        outputs = self._engine.run(feeds)
        return [
            tuple(tokens) if feed.num_outputs else None
            for feed, tokens in zip(feeds, outputs, strict=True)
        ]

    def truncate(self, slot: int, length: int) -> None:
        """Forget what the slot holds beyond ``length`` tokens."""
        if self._engine.length(slot) > length:
            self._engine.truncate(slot, length)

    def close(self, slot: int) -> None:
        """Free the slot."""
        self._engine.close(slot)

    def _feed(self, request: DraftRequest) -> Feed:
        held = self._engine.length(request.slot)
        tokens = request.tokens[held : held + self._prefill_tokens]
        is_last = held + len(tokens) == len(request.tokens)
        return Feed(request.slot, tokens, num_outputs=1 if is_last else 0)


class PromptLookupDrafter:
    """Proposes what followed the last tokens where they occurred before; needs no weights.

    The longest match counts, of the last ``max_match`` down to ``min_match`` tokens, and among
    equal ones the latest (Saxena, Prompt Lookup Decoding, 2023).
    """

    max_batch = 64

    def __init__(self, max_match: int = 4, min_match: int = 2, context_length: int = 1 << 20):
        """Look for matches of ``min_match`` to ``max_match`` tokens."""
        self._max_match = max_match
        self._min_match = min_match
        self._next_slot = 0
        self._indices: dict[int, _MatchIndex] = {}
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
        self._indices[self._next_slot] = _MatchIndex(self._min_match, self._max_match)
        return self._next_slot

    def draft(self, requests: Sequence[DraftRequest]) -> list[tuple[int, ...] | None]:
        """Look up each request; at most ``room`` tokens each."""
        return [
            tuple(self._indices[request.slot].continuation(request.tokens, request.room))
            for request in requests
        ]

    def truncate(self, slot: int, length: int) -> None:
        """Forget what was seen beyond ``length`` tokens."""
        self._indices[slot].truncate(length)

    def close(self, slot: int) -> None:
        """Free the slot."""
        del self._indices[slot]


class _MatchIndex:
    """For every run of tokens in a session, where it last ended: a look-up takes no scan.

    What is entered is the tokens before the last one, for a run must not find itself.
    """

    def __init__(self, min_match: int, max_match: int) -> None:
        self._sizes = range(max_match, min_match - 1, -1)
        # Position after each run, the latest last; a rollback pops what lies beyond.
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._entered: list[list[tuple[int, ...]]] = []

    def continuation(self, tokens: list[int], room: int) -> list[int]:
        while len(self._entered) < len(tokens) - 1:
            end = len(self._entered) + 1
            runs = [tuple(tokens[end - size : end]) for size in self._sizes if size <= end]
            for run in runs:
                self._ends.setdefault(run, []).append(end)
            self._entered.append(runs)
        for size in self._sizes:
            ends = self._ends.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if ends:
                return tokens[ends[-1] : ends[-1] + room]
        return []

    def truncate(self, length: int) -> None:
        while len(self._entered) > length:
            for run in self._entered.pop():
                ends = self._ends[run]
                ends.pop()
                if not ends:
                    del self._ends[run]
