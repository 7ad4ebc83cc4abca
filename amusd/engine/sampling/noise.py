"""The noise of coupled sampling: the reference, which every implementation equals bit for bit.

The noise of a token is standard Gumbel, so the largest of ``logits / temperature + noise`` is a
sample of their softmax (the Gumbel-max trick). It depends on the seed, the absolute position and
the token id alone, so a draft and a verify model that share a seed share it (Daliri et al.,
'Coupling without Communication and Drafter-Invariant Speculative Decoding', 2024).

- Random bits: Philox4x32-10 (Salmon et al., 'Parallel Random Numbers: As Easy as 1, 2, 3', 2011),
  key = the seed's low and high half, counter = (token id / 4, position, 0, 0); word = token id % 4.
- Noise: -log(-log(u)) with u = (bits + 0.5) / 2^32, in float64.
- The logarithm is a fixed sequence of additions, multiplications and divisions of IEEE 754, none of
  them fused, because the logarithms of libraries differ in their last bits.
"""

import numpy as np
import numpy.typing as npt

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
LN2 = 0.6931471805599453
SQRT2 = 1.4142135623730951
LOG_COEFFICIENTS = tuple(1.0 / (2 * power + 1) for power in range(11))
"""Of the series 2 s (1 + s^2 / 3 + s^4 / 5 + ...) of log((1 + s) / (1 - s))."""

_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)


def philox(
    counter: npt.NDArray[np.uint64], key: tuple[int, int], rounds: int = PHILOX_ROUNDS
) -> npt.NDArray[np.uint64]:
    """Return the random words of counters, [4, n] each, all below 2^32."""
    first, second, third, fourth = counter
    keys = [np.uint64(word) for word in key]
    for _ in range(rounds):
        product, other = (
            np.uint64(factor) * word
            for factor, word in zip(PHILOX_MULTIPLIERS, (first, third), strict=True)
        )
        first, second, third, fourth = (
            (other >> _HIGH) ^ second ^ keys[0],
            other & _LOW,
            (product >> _HIGH) ^ fourth ^ keys[1],
            product & _LOW,
        )
        keys = [
            (word + np.uint64(step)) & _LOW for word, step in zip(keys, PHILOX_WEYL, strict=True)
        ]
    return np.stack([first, second, third, fourth])


def random_bits(seed: int, position: int, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Return the random number of each token, [tokens], below 2^32."""
    blocks, inverse = np.unique(tokens >> 2, return_inverse=True)
    counter = np.zeros((4, len(blocks)), dtype=np.uint64)
    counter[0] = blocks
    counter[1] = position
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    found: npt.NDArray[np.uint64] = words[tokens & 3, inverse]
    return found


def exact_log(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the natural logarithm of positive normal numbers, the same bits everywhere."""
    bits = values.view(np.int64)
    exponent = (bits >> 52) - 1023
    mantissa = ((bits & ((1 << 52) - 1)) | (1023 << 52)).view(np.float64)  # [1, 2)
    is_large = mantissa > SQRT2
    mantissa = np.where(is_large, mantissa * 0.5, mantissa)
    exponent = (exponent + is_large).astype(np.float64)
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    square = ratio * ratio
    series = np.full_like(values, LOG_COEFFICIENTS[-1])
    for coefficient in reversed(LOG_COEFFICIENTS[:-1]):
        series = series * square
        series = series + coefficient
    product = exponent * LN2
    found: npt.NDArray[np.float64] = product + (ratio * 2.0) * series
    return found


def gumbel_of(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Return the Gumbel noise of random numbers below 2^32."""
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-32
    return -exact_log(-exact_log(uniform))


def gumbel_noise(
    seed: int, position: int, tokens: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Return the noise of tokens at a position, [tokens].

    Args:
        seed: below 2^64.
        position: absolute position of the token that is sampled, below 2^32.
        tokens: token ids, ``[tokens]``.
    """
    return gumbel_of(random_bits(seed, position, tokens))
