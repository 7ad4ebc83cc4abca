"""Fingerprints of vocabularies, and the description of a difference."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.fleet.vocabulary import BLOCK_SIZE, Vocabulary, explain_difference

WORDS = [f"word{index}" for index in range(3000)]


def changed(*ids: int) -> Vocabulary:
    """Return the vocabulary of ``WORDS`` with other tokens at ``ids``."""
    words = list(WORDS)
    for index in ids:
        words[index] = "other"
    return Vocabulary.of(words)


def test_the_same_tokens_have_the_same_fingerprint() -> None:
    assert Vocabulary.of(WORDS) == Vocabulary.of(list(WORDS))
    assert explain_difference(Vocabulary.of(WORDS), Vocabulary.of(WORDS)) is None


@given(st.lists(st.text(max_size=3), max_size=8), st.lists(st.text(max_size=3), max_size=8))
def test_fingerprints_are_equal_exactly_if_the_tokens_are(
    ours: list[str], theirs: list[str]
) -> None:
    same = Vocabulary.of(ours).fingerprint == Vocabulary.of(theirs).fingerprint
    assert same == (ours == theirs)


def test_tokens_with_equal_concatenation_have_different_fingerprints() -> None:
    assert Vocabulary.of(["ab", "c"]).fingerprint != Vocabulary.of(["a", "bc"]).fingerprint


def test_lone_surrogates_are_hashed() -> None:
    assert Vocabulary.of(["\ud800"]).fingerprint != Vocabulary.of(["\ud801"]).fingerprint


def test_each_block_of_ids_has_a_64_bit_hash() -> None:
    hashes = Vocabulary.of(WORDS).block_hashes
    assert len(hashes) == 3
    assert all(0 <= block < 2**64 for block in hashes)


def test_a_drafter_without_vocabulary_fits_every_model() -> None:
    assert Vocabulary(0).fits_any
    assert explain_difference(Vocabulary(0), Vocabulary.of(WORDS)) is None


def test_a_difference_is_located_by_block() -> None:
    assert explain_difference(changed(1500), Vocabulary.of(WORDS)) == (
        f"both have 3000 tokens; they differ in 1 of 3 blocks of ids, first among ids "
        f"{BLOCK_SIZE} to {2 * BLOCK_SIZE - 1}"
    )


def test_the_range_of_the_last_block_ends_at_the_last_id() -> None:
    description = explain_difference(changed(2999), Vocabulary.of(WORDS))
    assert description is not None
    assert description.endswith("first among ids 2048 to 2999")


def test_all_differing_blocks_are_counted() -> None:
    description = explain_difference(changed(5, 2999), Vocabulary.of(WORDS))
    assert description is not None
    assert "differ in 2 of 3 blocks of ids, first among ids 0 to 1023" in description


@pytest.mark.parametrize("num_more", [1, 2000])
def test_different_sizes_are_named(num_more: int) -> None:
    larger = Vocabulary.of([*WORDS, *(f"more{index}" for index in range(num_more))])
    description = explain_difference(Vocabulary.of(WORDS), larger)
    assert description is not None
    assert f"the draft model has 3000 tokens, the verify model {3000 + num_more}" in description


def test_a_vocabulary_that_extends_the_other_shares_its_ids() -> None:
    whole_blocks = WORDS[: 2 * BLOCK_SIZE]
    description = explain_difference(Vocabulary.of(whole_blocks), Vocabulary.of(WORDS))
    assert description is not None
    assert description.endswith("the ids they share are the same")


def test_a_hole_is_an_id_without_a_token_and_differs_from_every_token() -> None:
    holed = Vocabulary.of_ids({"a": 0, "c": 2})
    assert holed == Vocabulary.of(["a", None, "c"])
    assert holed.size == 3
    others = (["a", "", "c"], ["a", "b", "c"], ["a", "c"])
    assert holed.fingerprint not in {Vocabulary.of(tokens).fingerprint for tokens in others}


def test_ids_without_holes_give_the_vocabulary_of_their_tokens_in_any_order() -> None:
    assert Vocabulary.of_ids({"b": 1, "c": 2, "a": 0}) == Vocabulary.of(["a", "b", "c"])


def test_of_two_tokens_with_one_id_the_same_one_counts_in_any_order() -> None:
    assert Vocabulary.of_ids({"a": 0, "b": 0}) == Vocabulary.of_ids({"b": 0, "a": 0})


@pytest.mark.parametrize("ids", [{}, {"a": -1}, {"a": 0, "b": 1 << 40}])
def test_ids_that_are_no_vocabulary_are_refused(ids: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="the vocabulary has"):
        Vocabulary.of_ids(ids)
