"""Texts that an output must not contain, as the token sequences that are banned for them."""

from collections.abc import Callable, Sequence

from amusd.protocol.errors import InvalidInputError

_MAX_TEXTS = 128
_MAX_BYTES = 256


def banned_sequences(texts: Sequence[str], encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Return the tokens of each text alone and behind a space.

    The sequence behind a space counts only if it has as many tokens. A longer one has the space as
    a token of its own, so the first sequence is in it.

    Raises:
        InvalidInputError: there are too many texts, or one is empty or too long.
    """
    if len(texts) > _MAX_TEXTS:
        raise InvalidInputError(f"bad_texts has {len(texts)} texts: send at most {_MAX_TEXTS}")
    found: list[list[int]] = []
    for text in texts:
        word = text.lstrip(" ")
        if not word or len(text.encode()) > _MAX_BYTES:
            raise InvalidInputError(
                f"bad_texts has an empty text, or one of more than {_MAX_BYTES} bytes: leave it out"
            )
        plain, spaced = encode(word), encode(f" {word}")
        found.append(plain)
        if len(spaced) == len(plain) and spaced != plain:
            found.append(spaced)
    return found
