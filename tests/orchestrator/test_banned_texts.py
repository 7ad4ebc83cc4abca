"""Texts that an output must not contain, in tokens."""

import pytest

from amusd.protocol.errors import InvalidInputError
from orchestrator.banned_texts import banned_sequences
from orchestrator.text import ByteText


def words(text: str) -> list[int]:
    """Tokenize as most models do: a space belongs to the word behind it."""
    parts = text.replace(" ", "|_").strip("|").split("|")
    return [sum(part.encode()) for part in parts]


def test_a_word_is_banned_with_and_without_a_space_before_it() -> None:
    assert banned_sequences(["no", " way"], words) == [
        words("no"),
        words(" no"),
        words("way"),
        words(" way"),
    ]


def test_a_space_that_is_a_token_of_its_own_adds_nothing() -> None:
    assert banned_sequences(["ab"], ByteText().encode_part) == [[97, 98]]


@pytest.mark.parametrize("texts", [["a", ""], ["  "], ["x" * 257], ["a"] * 129])
def test_empty_long_and_many_texts_are_refused(texts: list[str]) -> None:
    with pytest.raises(InvalidInputError, match="bad_texts has"):
        banned_sequences(texts, words)
