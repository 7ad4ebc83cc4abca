"""The text of single tokens, as bytes.

The bytes of an output's tokens join to the UTF-8 of its text, for byte-level tokenizers and those
of SentencePiece. Where a token's text depends on its neighbours, it is the text behind a word.
"""

from tokenizers import Tokenizer, pre_tokenizers

from orchestrator.detokenizer import Detokenizer


class TokenBytes:
    """The bytes of a tokenizer's tokens, each found once."""

    def __init__(self, tokenizer: Tokenizer, tokens: Detokenizer) -> None:
        """Use ``tokenizer``, which must not change any more, and what ``tokens`` knows of it."""
        self._tokenizer = tokenizer
        self._tokens = tokens
        decoder = tokenizer.decoder
        is_byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
        self._byte_of_letter = _bytes_of_letters() if is_byte_level else {}
        self._word = [] if is_byte_level else tokens.find_plain_token()
        self._found: dict[tuple[int, bool], bytes] = {}  # at most two entries a token

    def of(self, token: int, begins_text: bool = False) -> bytes:
        """Return the bytes of a token, which may be a part of a character.

        A token that ``begins_text`` may lack the space before its word. Special and unknown tokens
        have no text.
        """
        found = self._found.get((token, begins_text))
        if found is None:
            found = self._find(token, begins_text)
            if self._tokenizer.id_to_token(token) is not None:
                self._found[token, begins_text] = found
        return found

    def _find(self, token: int, begins_text: bool) -> bytes:
        if not self._tokens.has_text(token):
            return b""
        byte = self._tokens.byte_of(token)
        if byte is not None:
            return bytes([byte])
        if self._byte_of_letter:
            return self._spelled(self._tokenizer.id_to_token(token) or "")
        before = [] if begins_text else self._word
        text = self._tokens.decode([*before, token])
        return text[len(self._tokens.decode(before)) :].encode()

    def _spelled(self, name: str) -> bytes:
        """Return the bytes of a byte-level token, which has one letter a byte, or is plain text."""
        try:
            return bytes(self._byte_of_letter[letter] for letter in name)
        except KeyError:
            return name.encode()


def _bytes_of_letters() -> dict[str, int]:
    """Return the byte of each letter in which byte-level tokenizers spell their tokens.

    Most printable characters of Latin-1 stand for themselves; letters from U+0100 on stand for the
    other bytes, in order.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {letter: ord(letter) for letter in letters if ord(letter) < 256}
    others = [byte for byte in range(256) if byte not in own.values()]
    return own | dict(zip(letters[len(own) :], others, strict=True))
