"""Trials of a model at start: what holds for it cannot be read off its name.

Each takes passes and their buffers, and says what was found; what follows is decided elsewhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from amusd.engine.runners.runner import Buffer, Chunk, ModelRunner

# What a model or a cache raises that does not fit the other.
MISFITS = (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError, IndexError)

_TOLERANCE = 0.05
_NUM_TOKENS = 10
_ROLLED_BACK = 3


def same_after_rollback(passes: ModelRunner[Buffer], output_size: int) -> bool:
    """Whether logits are the same, but for rounding, when the cache was rolled back before.

    Architectures with a recurrent state cannot be brought back to an earlier position.
    """
    tokens = _text(output_size, 0)
    with _buffers(passes, 1) as [buffer]:
        before = passes.logits([Chunk(buffer, 0, tokens, len(tokens))])
        rest = tokens[_ROLLED_BACK:]
        after = passes.logits([Chunk(buffer, _ROLLED_BACK, rest, len(rest))])
    return _close(before[_ROLLED_BACK:], after)


def same_when_batched(
    passes: ModelRunner[Buffer], alone: ModelRunner[Buffer], output_size: int
) -> bool:
    """Whether two sessions that share passes get the logits that ``alone`` gives, but for rounding.

    One of them is rolled back between the passes.
    """
    texts = [_text(output_size, 1), _text(output_size, 2)[:7]]
    expected = []
    for text in texts:
        with _buffers(alone, 1) as [buffer]:
            expected.append(alone.logits([Chunk(buffer, 0, text, 1)]))
    with _buffers(passes, 2) as buffers:
        begun = [Chunk(buffer, 0, text[:4], 0) for buffer, text in zip(buffers, texts, strict=True)]
        passes.logits(begun)
        rest = [Chunk(buffers[0], 4, texts[0][4:], 1), Chunk(buffers[1], 2, texts[1][2:], 1)]
        return _close(torch.cat(expected), passes.logits(rest))


def same_to_the_bit(
    passes: ModelRunner[Buffer], output_size: int, num_places: int, num_sessions: int
) -> bool:
    """Whether a token's logits have the same bits at each of ``num_places`` places of a pass.

    They are compared with one token a pass alone. The other places hold a companion's tokens; the
    text before is cut differently each time, and in another one of ``num_sessions`` buffers, 2 or
    more, of another size.
    """
    text, companion = _text(output_size, 3), _text(output_size, 4)
    with _buffers(passes, 1) as [buffer]:
        steps = [passes.logits([Chunk(buffer, i, [text[i]], 1)]) for i in range(len(text))]
    expected = torch.cat(steps)
    for place in range(num_places):
        cut = place % (len(text) - 1)
        shift = [companion[i % len(companion)] for i in range(place)]
        with _buffers(passes, num_sessions, _NUM_TOKENS + num_places + place) as buffers:
            mine, other = (buffers[(place + i) % num_sessions] for i in range(2))
            found = [passes.logits([Chunk(mine, 0, text[:cut], cut)])] if cut else []
            beside = [Chunk(other, 0, shift, 0)] if shift else []
            rest = text[cut:]
            found.append(passes.logits([*beside, Chunk(mine, cut, rest, len(rest))]))
        if not torch.equal(torch.cat(found), expected):
            return False
    return True


@contextmanager
def _buffers(
    passes: ModelRunner[Buffer], count: int, capacity: int = _NUM_TOKENS
) -> Iterator[list[Buffer]]:
    buffers = [passes.make(capacity) for _ in range(count)]
    try:
        yield buffers
    finally:
        for buffer in buffers:
            passes.drop(buffer)


def _text(output_size: int, seed: int) -> list[int]:
    """Return tokens that differ from seed to seed, all known to the model."""
    return [(seed * 31 + i * i * 7 + i) % output_size for i in range(1, _NUM_TOKENS + 1)]


def _close(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first.float(), second.float(), rtol=_TOLERANCE, atol=_TOLERANCE)
