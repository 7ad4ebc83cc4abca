"""Which outputs of a chunk are valid if its last tokens make the model compute NaN.

Attention multiplies the values of later tokens by 0, and 0 times NaN is NaN. So one proposed token
may break the outputs before it, although they do not depend on it.
"""

from collections.abc import Callable, Sequence

from amusd.engine.interface import NO_TOKEN
from amusd.engine.runners.runner import Buffer, Chunk

Run = Callable[[Sequence[Chunk[Buffer]]], list[int]]


def finite_outputs(run: Run[Buffer], chunk: Chunk[Buffer]) -> list[int]:
    """Return the tokens of ``chunk``, with ``NO_TOKEN`` only from the first broken output on.

    It runs prefixes of the chunk, by bisection. The buffer then holds the longest finite one.
    """
    num_before = len(chunk.tokens) - chunk.num_outputs
    found: list[int] = []
    low, high = 0, chunk.num_outputs  # of the outputs, ``low`` are valid and ``high`` are not
    while high - low > 1:
        middle = (low + high) // 2
        tokens = run([chunk.part(0, num_before + middle)])
        if NO_TOKEN in tokens:
            high = middle
        else:
            low, found = middle, tokens
    if low:
        run([chunk.part(0, num_before + low)])
    return found + [NO_TOKEN] * (chunk.num_outputs - low)
