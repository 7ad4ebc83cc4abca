"""How much text a number of tokens can stand for. It refuses a text before it is tokenized.

A bound holds only where no character is lost on the way to tokens. Some tokenizers drop characters
or make one token of a word of any length; these have no bound.
"""

import json
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from amusd.protocol.errors import InvalidInputError

_BLOCK = 1 << 16  # characters; other threads get their turn between two blocks
# Bytes of a text for each byte after normalization. In the Unicode forms a character of 4 bytes
# may become one of 1 byte, and no form drops any.
_SHRINKS = {"NFC": 4, "NFD": 4, "NFKC": 4, "NFKD": 4, "Lowercase": 4, "Prepend": 1, "ByteLevel": 1}
_LOSSLESS_SPLITS = ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts")


@dataclass(frozen=True, slots=True)
class TextBound:
    """Most bytes of text that a token stands for; None: unknown.

    ``counts_space`` is False if a token may take any number of spaces with it. ``lost`` are bytes
    without a token, which the tokenizer leaves out.
    """

    bytes_per_token: int | None
    counts_space: bool = True
    lost: bytes = b""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "TextBound":
        """Return the bound of a tokenizer."""
        shrink = _shrink(_parsed(tokenizer.normalizer))
        is_byte_level = _is_byte_level(tokenizer)
        lost = _bytes_without_token(tokenizer) if is_byte_level else b""
        if shrink is None or (lost and shrink > 1):
            return cls(None)
        if not _splits_keep_all(_parsed(tokenizer.pre_tokenizer)):
            return cls(None)
        if not (is_byte_level or _falls_back_to_bytes(tokenizer)):
            return cls(None)
        own = tokenizer.get_vocab(with_added_tokens=False)
        longest = max(len(token) if is_byte_level else len(token.encode()) for token in own)
        added = tokenizer.get_added_tokens_decoder().values()
        longest = max([longest, *(len(token.content.encode()) for token in added)])
        takes_space = any(token.lstrip or token.rstrip for token in added)
        return cls(longest * shrink, not takes_space, lost)

    def check(self, text: str, max_tokens: int | None) -> None:
        """Refuse a text that has more tokens than ``max_tokens`` in any case; None: no limit.

        Raises:
            InvalidInputError: the text is too long.
        """
        if self.bytes_per_token is None or max_tokens is None:
            return
        most = max_tokens * self.bytes_per_token
        if len(text) <= most // 4:  # a character has at most 4 bytes
            return
        num_bytes = sum(self._size(text[at : at + _BLOCK]) for at in range(0, len(text), _BLOCK))
        if num_bytes > most:
            raise InvalidInputError(
                f"the prompt has {num_bytes} bytes, and the context of {max_tokens} tokens holds "
                f"at most {most} bytes of text: shorten the prompt"
            )

    def _size(self, block: str) -> int:
        if not self.counts_space:
            block = "".join(block.split())
        return len(block.encode(errors="surrogatepass").translate(None, self.lost))


def _parsed(part: Any) -> dict[str, Any]:
    """Return the description of a part of a tokenizer; empty if there is none."""
    return {} if part is None else dict(json.loads(part.__getstate__()))


def _shrink(normalizer: dict[str, Any]) -> int | None:
    """Return how much shorter a text may get, as a factor; None: it may lose characters."""
    kind = normalizer.get("type")
    if kind is None:
        return 1
    if kind == "Sequence":
        factor = 1
        for one in normalizer["normalizers"]:
            part = _shrink(one)
            if part is None:
                return None
            factor *= part
        return factor
    if kind == "Replace":
        pattern, content = normalizer["pattern"].get("String"), normalizer["content"]
        grows = pattern is not None and len(content.encode()) >= len(pattern.encode())
        return 1 if grows else None
    return _SHRINKS.get(kind)


def _splits_keep_all(splitter: dict[str, Any]) -> bool:
    """Whether splitting a text into words keeps all of its characters."""
    kind = splitter.get("type")
    if kind == "Sequence":
        return all(_splits_keep_all(one) for one in splitter["pretokenizers"])
    if kind in ("Split", "Punctuation"):
        return bool(splitter["behavior"] != "Removed")
    return kind is None or kind in _LOSSLESS_SPLITS


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether words are written in letters for bytes; a letter without a token is left out."""
    kinds = json.dumps([_parsed(tokenizer.normalizer), _parsed(tokenizer.pre_tokenizer)])
    model: Any = tokenizer.model
    drops_unknown = type(model).__name__ == "BPE" and model.unk_token is None
    return drops_unknown and '"ByteLevel"' in kinds


def _bytes_without_token(tokenizer: Tokenizer) -> bytes:
    """Return the bytes whose letter is no token."""
    # Bytes that Latin-1 can print are their own letters; the others have those from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [number for number in range(256) if number not in printable]
    letters = {number: chr(number) for number in printable}
    letters |= {number: chr(256 + index) for index, number in enumerate(others)}
    return bytes(number for number in letters if tokenizer.token_to_id(letters[number]) is None)


def _falls_back_to_bytes(tokenizer: Tokenizer) -> bool:
    """Whether a character without a token becomes tokens of its bytes."""
    names = (f"<0x{byte:02X}>" for byte in range(256))
    return bool(getattr(tokenizer.model, "byte_fallback", False)) and all(
        tokenizer.token_to_id(name) is not None for name in names
    )
