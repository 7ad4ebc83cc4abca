"""Checks of a model runner at start, for what the name of a model does not tell.

Each check runs a few tokens and returns what it finds. The runner selection decides what follows.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from amusd.engine.runners.runner import Buffer, Chunk, ModelRunner

MISFITS = (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError, IndexError)
"""What a model or a cache raises if they do not fit each other."""

_TOLERANCE = 0.05
_NUM_TOKENS = 10
_ROLLED_BACK = 3


def same_after_rollback(runner: ModelRunner[Buffer], output_size: int) -> bool:
    """Whether logits stay the same, except for rounding, after the cache is rolled back.

    An architecture with a recurrent state cannot return to an earlier position.
    """
    tokens = _text(output_size, 0)
    with _buffers(runner, 1) as [buffer]:
        before = runner.logits([Chunk(buffer, 0, tokens, len(tokens))])
        rest = tokens[_ROLLED_BACK:]
        after = runner.logits([Chunk(buffer, _ROLLED_BACK, rest, len(rest))])
    return _close(before[_ROLLED_BACK:], after)


def same_when_batched(
    runner: ModelRunner[Buffer], unbatched: ModelRunner[Buffer], output_size: int
) -> bool:
    """Whether two sequences in a batch get the logits of ``unbatched``, except for rounding.

    One of them is rolled back between the batches.
    """
    texts = [_text(output_size, 1), _text(output_size, 2)[:7]]
    expected = []
    for text in texts:
        with _buffers(unbatched, 1) as [buffer]:
            expected.append(unbatched.logits([Chunk(buffer, 0, text, 1)]))
    with _buffers(runner, 2) as buffers:
        first = [Chunk(buffer, 0, text[:4], 0) for buffer, text in zip(buffers, texts, strict=True)]
        runner.logits(first)
        rest = [Chunk(buffers[0], 4, texts[0][4:], 1), Chunk(buffers[1], 2, texts[1][2:], 1)]
        return _close(torch.cat(expected), runner.logits(rest))


def same_to_the_bit(
    runner: ModelRunner[Buffer], output_size: int, num_places: int, num_buffers: int
) -> bool:
    """Whether a token's logits have the same bits at each of ``num_places`` places of a batch.

    The expected logits come from one token a batch. The other places of a batch hold tokens of a
    second sequence. Each time the prefill has other chunks, and another one of ``num_buffers``
    buffers, 2 or more, of another capacity.
    """
    text, companion = _text(output_size, 3), _text(output_size, 4)
    with _buffers(runner, 1) as [buffer]:
        steps = [runner.logits([Chunk(buffer, i, [text[i]], 1)]) for i in range(len(text))]
    expected = torch.cat(steps)
    for place in range(num_places):
        cut = place % (len(text) - 1)
        shift = [companion[i % len(companion)] for i in range(place)]
        with _buffers(runner, num_buffers, _NUM_TOKENS + num_places + place) as buffers:
            mine, other = (buffers[(place + i) % num_buffers] for i in range(2))
            found = [runner.logits([Chunk(mine, 0, text[:cut], cut)])] if cut else []
            beside = [Chunk(other, 0, shift, 0)] if shift else []
            rest = text[cut:]
            found.append(runner.logits([*beside, Chunk(mine, cut, rest, len(rest))]))
        if not torch.equal(torch.cat(found), expected):
            return False
    return True


@contextmanager
def _buffers(
    runner: ModelRunner[Buffer], count: int, capacity: int = _NUM_TOKENS
) -> Iterator[list[Buffer]]:
    buffers = [runner.allocate(capacity) for _ in range(count)]
    try:
        yield buffers
    finally:
        for buffer in buffers:
            runner.free(buffer)


def _text(output_size: int, seed: int) -> list[int]:
    """Return tokens of the model's vocabulary that differ from seed to seed."""
    return [(seed * 31 + i * i * 7 + i) % output_size for i in range(1, _NUM_TOKENS + 1)]


def _close(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first.float(), second.float(), rtol=_TOLERANCE, atol=_TOLERANCE)
