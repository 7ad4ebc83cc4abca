"""How prompts are read: in pieces, so many tokens a pass, and a common beginning only once."""

from collections.abc import Sequence
from dataclasses import dataclass

from amusd.engine.interface import Engine, ScheduledSequence
from amusd.engine.kv.cache_manager import MIN_CACHED, common_prefix
from amusd.protocol.errors import AmusdError

_MOST_ALONG = 16
"""So few tokens behind is no reading: what was accepted, or looked up, since the last pass."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a session reads in a pass; no tokens: it waits for another pass.

    ``num_cached`` tokens before them were copied from another slot just now.
    """

    tokens: list[int]
    is_last: bool = False
    is_prompt: bool = False
    num_cached: int = 0


class PromptReader:
    """Shares out the prompt tokens of each pass, in the order in which sessions ask."""

    def __init__(self, engine: Engine, tokens_per_pass: int, reuses: bool = True) -> None:
        """Read at most ``tokens_per_pass`` over all sessions of a pass.

        ``reuses`` says whether the engine takes over what other slots hold: a session then waits
        while another one reads the same.
        """
        self._engine = engine
        self._tokens_per_pass = tokens_per_pass
        self._reuses = reuses
        self._left = tokens_per_pass
        self._being_read: list[list[int]] = []

    def begin_pass(self) -> None:
        """Start with the whole budget again."""
        self._left = self._tokens_per_pass
        self._being_read.clear()

    def next_piece(self, slot: int, tokens: list[int], num_prompt: int) -> Chunk:
        """Return what ``slot`` reads of ``tokens``, all of its session's; the first are a prompt.

        Who is done with the prompt takes part in every pass, whatever the budget.
        """
        held = self._engine.length(slot)
        most_along = min(_MOST_ALONG, self._tokens_per_pass)
        if held >= num_prompt and len(tokens) - held <= most_along:
            return Chunk(tokens[held:], is_last=True)
        if not self._left:
            return Chunk([])
        num_cached = self._engine.reuse(slot, tokens)
        held += num_cached
        if self._reuses and self._is_being_read(tokens, held):
            return Chunk([], num_cached=num_cached)
        end = min(len(tokens), held + self._left)
        self._left -= end - held
        self._being_read.append(tokens[:end])
        return Chunk(
            tokens[held:end],
            is_last=end == len(tokens),
            is_prompt=held < num_prompt,
            num_cached=num_cached,
        )

    def _is_being_read(self, tokens: list[int], held: int) -> bool:
        """Whether another session's piece of this pass is worth waiting for."""
        if len(tokens) <= held + MIN_CACHED:
            return False
        wanted = tokens[:-1]
        return any(common_prefix(read, wanted) >= held + MIN_CACHED for read in self._being_read)


def run_pass(engine: Engine, feeds: Sequence[ScheduledSequence]) -> list[list[int]]:
    """Run a pass; if it fails, its slots hold what they held before.

    Raises:
        AmusdError: what the engine raised.
    """
    lengths = [engine.length(feed.slot) for feed in feeds]
    try:
        return engine.run(feeds)
    except AmusdError:
        # What it left behind is not to be trusted, and a later session might reuse it.
        for feed, length in zip(feeds, lengths, strict=True):
            engine.truncate(feed.slot, length)
        raise
