"""Which outputs of a chunk are valid if its last tokens make the model compute NaN.

Attention multiplies the values of later tokens by 0, and 0 times NaN is NaN. So one proposed token
may break the outputs before it, although they do not depend on it.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from amusd.engine.runners.runner import Buffer, Chunk

Output = TypeVar("Output")
"""What a runner gives for an output: a token, or what it sampled."""


def finite_outputs(
    run: Callable[[Sequence[Chunk[Buffer]]], list[Output]], chunk: Chunk[Buffer], broken: Output
) -> list[Output]:
    """Return the outputs of ``chunk``, with ``broken`` only from the first broken output on.

    It runs prefixes of the chunk, by bisection. The buffer then holds the longest finite one.

    Args:
        run: a runner's method.
        chunk: what to run.
        broken: what ``run`` returns for an output that is not finite.
    """
    num_before = len(chunk.tokens) - chunk.num_outputs
    found: list[Output] = []
    low, high = 0, chunk.num_outputs  # of the outputs, ``low`` are valid and ``high`` are not
    while high - low > 1:
        middle = (low + high) // 2
        outputs = run([chunk.part(0, num_before + middle)])
        if broken in outputs:
            high = middle
        else:
            low, found = middle, outputs
    if low:
        run([chunk.part(0, num_before + low)])
    return found + [broken] * (chunk.num_outputs - low)
