"""The noise of coupled sampling in PyTorch, on any device; the same bits as ``noise.py``.

Each operation is a call of its own, so no compiler fuses a multiplication and an addition.
"""

import torch
from torch import Tensor

from amusd.engine.sampling.noise import (
    LN2,
    LOG_COEFFICIENTS,
    PHILOX_MULTIPLIERS,
    PHILOX_ROUNDS,
    PHILOX_WEYL,
    SQRT2,
)

_LOW = 0xFFFFFFFF
_MANTISSA = (1 << 52) - 1
_ONE = 1023 << 52  # the exponent bits of numbers in [1, 2)


def philox(blocks: Tensor, positions: Tensor, keys: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Return the 4 random words of each block of 4 tokens, below 2^32, int64.

    Args:
        blocks: token id / 4, int64.
        positions: absolute positions, int64.
        keys: the low and the high half of the seeds, int64.

    All broadcast to one shape, which each word has. A product of two 32-bit numbers wraps in int64,
    but its bits are right.
    """
    first, second = blocks, positions
    third = fourth = torch.zeros_like(blocks)
    low, high = keys
    for _ in range(PHILOX_ROUNDS):
        product, other = first * PHILOX_MULTIPLIERS[0], third * PHILOX_MULTIPLIERS[1]
        first, second, third, fourth = (
            _high(other) ^ second ^ low,
            other & _LOW,
            _high(product) ^ fourth ^ high,
            product & _LOW,
        )
        low, high = (low + PHILOX_WEYL[0]) & _LOW, (high + PHILOX_WEYL[1]) & _LOW
    return [first, second, third, fourth]


def exact_log(values: Tensor) -> Tensor:
    """Return the natural logarithm of positive normal float64 numbers, as ``noise.exact_log``."""
    bits = values.view(torch.int64)
    mantissa = ((bits & _MANTISSA) | _ONE).view(torch.float64)
    is_large = mantissa > SQRT2
    mantissa = torch.where(is_large, mantissa * 0.5, mantissa)
    exponent = ((bits >> 52) - 1023 + is_large).double()
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    square = ratio * ratio
    series = torch.full_like(values, LOG_COEFFICIENTS[-1])
    for coefficient in reversed(LOG_COEFFICIENTS[:-1]):
        series = series * square
        series = series + coefficient
    product = exponent * LN2
    scaled = (ratio * 2.0) * series
    return product + scaled


def uniform_of(bits: Tensor) -> Tensor:
    """Return the float64 numbers in (0, 1) of random int64 numbers below 2^32."""
    return (bits.double() + 0.5) * 2.0**-32


def gumbel_of(bits: Tensor) -> Tensor:
    """Return the Gumbel noise of random numbers below 2^32, as ``noise.gumbel_of``."""
    return -exact_log(-exact_log(uniform_of(bits)))


def nearly_gumbel_of(bits: Tensor) -> Tensor:
    """Return the noise with the library's logarithm: quicker, and off by less than 1e-12."""
    return uniform_of(bits).log_().neg_().log_().neg_()


def _high(product: Tensor) -> Tensor:
    return (product >> 32) & _LOW
