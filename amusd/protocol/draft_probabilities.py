"""The draft's own probabilities beside its tokens. They are hints, and change no token.

There is one for each token, 0 to 1; 0 stands for one that is not known. No values at all: none is
known.
"""

import math
from collections.abc import Iterable

from amusd.protocol.errors import InvalidInputError

UNKNOWN = 0.0
MIN_USE_PROBABILITY = 0.05
"""A token that is used less often is not drafted: it costs energy, and slows the verify model down
where the two devices share memory or power."""


def check_probabilities(tokens: tuple[int, ...], probabilities: tuple[float, ...]) -> None:
    """Check that ``probabilities`` belong to ``tokens``.

    Raises:
        InvalidInputError: their number differs, or one is not within 0 to 1.
    """
    if not fit(tokens, probabilities):
        raise InvalidInputError(
            f"{len(probabilities)} probabilities beside {len(tokens)} tokens: send one of 0 to 1 "
            "for each token, or none"
        )


def padded(tokens: tuple[int, ...], probabilities: tuple[float, ...]) -> tuple[float, ...]:
    """Return one probability for each token; those that do not fit the tokens count as unknown."""
    if probabilities and fit(tokens, probabilities):
        return probabilities
    return (UNKNOWN,) * len(tokens)


def use_probability(probabilities: Iterable[float]) -> float:
    """Return how likely all tokens are right; those of unknown probability count as right."""
    return math.prod(one for one in probabilities if one)


def trimmed(probabilities: Iterable[float]) -> tuple[float, ...]:
    """Return the probabilities, or none if all are unknown."""
    found = tuple(probabilities)
    return found if any(found) else ()


def fit(tokens: tuple[int, ...], probabilities: tuple[float, ...]) -> bool:
    """Whether there is one probability for each token, or none at all."""
    if not probabilities:
        return True
    is_whole = len(probabilities) == len(tokens)
    return is_whole and all(0.0 <= one <= 1.0 for one in probabilities)  # not NaN either
