"""Several sessions at once on one engine, as a verify service runs them."""

from collections.abc import Sequence
from dataclasses import dataclass

from amusd.engine.interface import ScheduledSequence
from amusd.engine.model_engine import ModelEngine

_CHUNK = 13  # tokens of a prompt in one batch


@dataclass
class _Session:
    slot: int
    num_prompt: int
    tokens: list[int]
    num_wrong: int


def write_together(
    engine: ModelEngine, prompts: Sequence[list[int]], num_tokens: int
) -> list[list[int]]:
    """Return ``num_tokens`` greedy tokens after each prompt.

    Prompts are computed in chunks. Each pass also checks up to 3 wrong tokens, which are rolled
    back. A batch has as many sessions as the engine takes, in turn.
    """
    waiting = [
        _Session(engine.open(len(prompt) + num_tokens + 4), len(prompt), list(prompt), index % 4)
        for index, prompt in enumerate(prompts)
    ]
    sessions = list(waiting)
    for session in sessions:
        engine.reuse(session.slot, session.tokens)
    while waiting:
        batch = waiting[: engine.max_batch]
        waiting = waiting[engine.max_batch :]
        found = engine.run([_next_chunk(engine, session) for session in batch])
        for session, tokens in zip(batch, found, strict=True):
            if tokens:
                session.tokens.append(tokens[0])
                engine.truncate(session.slot, len(session.tokens) - 1)
            if len(session.tokens) < session.num_prompt + num_tokens:
                waiting.append(session)
            else:
                engine.close(session.slot)
    return [session.tokens[session.num_prompt :] for session in sessions]


def _next_chunk(engine: ModelEngine, session: _Session) -> ScheduledSequence:
    held = engine.length(session.slot)
    rest = session.tokens[held : held + _CHUNK]
    if held + len(rest) < len(session.tokens):
        return ScheduledSequence(session.slot, rest, 0, is_prompt=True)
    wrong = [(rest[-1] + 7 * index) % 256 for index in range(1, session.num_wrong + 1)]
    return ScheduledSequence(session.slot, rest + wrong, len(wrong) + 1)
