"""Tokens of an output to text, incrementally; needs no torch.

A character may take several tokens, so text that ends in the middle of a character is held back
until the character is complete.
"""

import codecs
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"


class TextDecoder(Protocol):
    """Decodes the tokens of one output incrementally."""

    def feed(self, tokens: Sequence[int]) -> str:
        """Add ``tokens`` and return the new text, up to the last complete character."""

    def finish(self) -> str:
        """Return the text that was held back."""


class ModelDecoder:
    """Decodes new tokens together with a few earlier ones, because a token's text depends on them.

    The text of tokens [prefix, shown) was returned before. The new text is what the text of tokens
    [prefix, end) has beyond it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Decode one output of the model of ``tokenizer``."""
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._prefix = 0
        self._shown = 0

    def feed(self, tokens: Sequence[int]) -> str:
        """Add ``tokens`` and return the new text, up to the last complete character."""
        self._tokens.extend(tokens)
        new = self._new_text()
        if new.endswith(_REPLACEMENT):
            return ""
        self._prefix, self._shown = self._shown, len(self._tokens)
        return new

    def finish(self) -> str:
        """Return the text that was held back."""
        new = self._new_text()
        self._prefix = self._shown = len(self._tokens)
        return new

    def _new_text(self) -> str:
        shown = self._tokenizer.decode(self._tokens[self._prefix : self._shown])
        both = self._tokenizer.decode(self._tokens[self._prefix :])
        return str(both[len(shown) :])


class ByteDecoder:
    """Decodes tokens 0 to 255 as UTF-8 bytes; other tokens have no text."""

    def __init__(self) -> None:
        """Start an output."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, tokens: Sequence[int]) -> str:
        """Add ``tokens`` and return the new text, up to the last complete character."""
        return self._decoder.decode(bytes(token for token in tokens if token < 256))

    def finish(self) -> str:
        """Return the text that was held back."""
        return self._decoder.decode(b"", final=True)


class NoDecoder:
    """Gives every output an empty text."""

    def feed(self, tokens: Sequence[int]) -> str:
        """Add ``tokens`` and return the new text, up to the last complete character."""
        return ""

    def finish(self) -> str:
        """Return the text that was held back."""
        return ""
