"""The noise of coupled sampling against published vectors, and as a distribution."""

import math

import numpy as np
import pytest

from amusd.engine.sampling.noise import (
    exact_log,
    gumbel_noise,
    gumbel_of,
    philox,
    random_bits,
)

# From the known answer tests of Random123.
_KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), _KNOWN)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    found = philox(np.array([counter], dtype=np.uint64).T, key)
    assert tuple(int(word) for word in found[:, 0]) == words


def test_a_token_takes_its_word_of_its_block() -> None:
    tokens = np.array([5, 0, 4, 7, 6, 49_151])
    bits = random_bits((0x299F31D0 << 32) | 0xA4093822, 77, tokens)
    for token, found in zip(tokens, bits, strict=True):
        counter = np.array([[token // 4], [77], [0], [0]], dtype=np.uint64)
        assert found == philox(counter, (0xA4093822, 0x299F31D0))[token % 4, 0]


def test_the_logarithm_is_one() -> None:
    values = np.concatenate(
        [np.geomspace(1e-12, 40, 20_000), 1.0 - np.geomspace(1e-10, 0.5, 5_000), [1.0, 2.0, 0.5]]
    )
    expected = np.array([math.log(value) for value in values])
    np.testing.assert_allclose(exact_log(values), expected, rtol=4e-15, atol=0)


def test_the_noise_is_finite_for_all_bits() -> None:
    noise = gumbel_of(np.array([0, 1, 2**31, 2**32 - 1], dtype=np.uint64))
    assert np.isfinite(noise).all()
    assert np.all(np.diff(noise) > 0)
    assert noise[0] == pytest.approx(-math.log(33 * math.log(2)))
    assert noise[-1] == pytest.approx(33 * math.log(2))


def test_the_noise_is_gumbel() -> None:
    noise = gumbel_noise(3, 9, np.arange(200_000))
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.01)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.03)


def test_seeds_and_positions_have_noise_of_their_own() -> None:
    tokens = np.arange(10_000)
    first = gumbel_noise(1, 1, tokens)
    for other in (gumbel_noise(2, 1, tokens), gumbel_noise(1, 2, tokens)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.05
