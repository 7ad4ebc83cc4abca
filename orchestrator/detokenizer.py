"""Tokens of an output to text, incrementally; needs no torch.

The pieces of an output join to the text of all its tokens, as the tokenizer decodes it at once.
Text that may still change is held back: an incomplete character, or a short run of byte tokens.
"""

import codecs
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"
_NUM_CONTEXT_TOKENS = 8
_MAX_RUN_BYTES = 32


class TextDecoder(Protocol):
    """Decodes the tokens of one output incrementally."""

    def feed(self, tokens: Sequence[int]) -> str:
        """Add ``tokens`` and return the new text that is final."""

    def pending(self) -> str:
        """Return the text that ``finish`` would return now.

        It is empty if that ends with an incomplete character.
        """

    def finish(self) -> str:
        """Return the text that was held back."""


class Detokenizer:
    """The tokens of a tokenizer as decoding sees them; makes the decoders of outputs."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Decode with ``tokenizer``, which must not change any more."""
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        self._special_tokens = frozenset(token.content for token in added if token.special)
        self._byte_of = dict(self._byte_tokens())
        self._plain_token = self.find_plain_token() if self._byte_of else []

    def decoder(self, prompt: Sequence[int] = ()) -> TextDecoder:
        """Return a decoder for one output; its text continues the text of ``prompt``."""
        return ModelDecoder(self, prompt)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ``tokens``, decoded at once.

        It is empty where the library's decoder panics: when it strips more than there is.
        """
        if not tokens:
            return ""
        try:
            return str(self._tokenizer.decode(tokens))
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # the library does not export it
                raise
            return ""

    def has_text(self, token: int) -> bool:
        """Whether decoding regards a token; it skips special and unknown tokens."""
        name = self._tokenizer.id_to_token(token)
        return name is not None and name not in self._special_tokens

    def byte_of(self, token: int) -> int | None:
        """Return the byte that a token of a byte fallback stands for, or None."""
        return self._byte_of.get(token)

    def restart(self) -> list[int]:
        """Return tokens with plain text, after which any text is in the middle of an output."""
        return list(self._plain_token)

    def context(self, prompt: Sequence[int]) -> list[int]:
        """Return the last tokens of ``prompt`` on which the text of an output depends."""
        tail: list[int] = []
        for token in reversed(prompt):
            if self.has_text(token):
                if len(tail) == _NUM_CONTEXT_TOKENS + _MAX_RUN_BYTES:
                    break
                tail.append(token)
        else:
            return tail[::-1]  # the whole prompt
        while tail and tail[-1] in self._byte_of:  # the end of a run whose start is cut off
            tail.pop()
        return tail[::-1] or self.restart()

    def _byte_tokens(self) -> list[tuple[int, int]]:
        """Return the tokens of bytes, each with its byte, if the decoder has a byte fallback."""
        found = []
        for byte in range(256):
            for name in {f"<0x{byte:02X}>", f"<0x{byte:02x}>"}:
                token = self._tokenizer.token_to_id(name)
                if token is not None and self.decode([token]) != name:
                    found.append((token, byte))
        return found

    def find_plain_token(self) -> list[int]:
        """Return a token whose text is a word of ASCII letters; none if there is no such token."""
        for token in range(self._tokenizer.get_vocab_size()):
            if self.has_text(token) and token not in self._byte_of:
                text = self.decode([token])
                if text.isascii() and text.isalpha():
                    return [token]
        return []


class ModelDecoder:
    """Decodes new tokens together with some earlier ones, because a token's text depends on them.

    The tokens [0, end - run) of the window are decoded at once; the first ``num_shown`` characters
    of their text belong to the prompt or were returned before. The rest is new, except for
    an incomplete character at its end. The tokens [end - run, end) are an open run of bytes.

    A byte fallback turns a whole run of byte tokens into U+FFFD if any of it is broken. So a run is
    held back until it ends or breaks, or has more than 32 bytes. Its complete characters are then
    final.
    """

    def __init__(self, tokens: Detokenizer, prompt: Sequence[int] = ()) -> None:
        """Start an output whose text continues the text of ``prompt``."""
        self._tokens = tokens
        self._window: list[int] = []
        self._num_shown = 0
        self._run = _ByteRun()
        self._is_run_of_prompt = False
        for token in tokens.context(prompt):
            self._add(token)
        self._num_shown = len(tokens.decode(self._window))
        self._is_run_of_prompt = self._run.num_bytes > 0

    def feed(self, tokens: Sequence[int]) -> str:
        """Add ``tokens`` and return the new text that is final."""
        early = "".join([self._add(token) for token in tokens])
        new = early + self._show(self._run.num_bytes, is_final=False)
        self._trim()
        return new

    def pending(self) -> str:
        """Return the text of an open run of complete characters."""
        run = self._run
        if not run.num_bytes or run.num_incomplete or run.is_broken:
            return ""
        return self._tokens.decode(self._window)[self._num_shown :]

    def finish(self) -> str:
        """Return the text that was held back."""
        return self._show(0, is_final=True)

    def _add(self, token: int) -> str:
        """Add a token; return new text only where a run of bytes breaks or grows too long."""
        if not self._tokens.has_text(token):
            return ""
        byte = self._tokens.byte_of(token)
        if byte is None:
            self._end_run()
            self._window.append(token)
            return ""
        if self._run.is_broken:
            return _REPLACEMENT
        self._window.append(token)
        self._run.add(byte)
        if self._run.is_broken:
            return self._cut_run(0)
        if self._run.num_bytes > _MAX_RUN_BYTES:
            return self._cut_run(self._run.num_incomplete)
        return ""

    def _end_run(self) -> None:
        if self._is_run_of_prompt:
            # A character that the output completes is shorter than its bytes in the prompt were.
            self._num_shown = min(self._num_shown, len(self._tokens.decode(self._window)))
            self._is_run_of_prompt = False
        if self._run.num_bytes or self._run.is_broken:
            self._run = _ByteRun()

    def _cut_run(self, num_kept: int) -> str:
        """Return all text but that of the last ``num_kept`` bytes, with which the run goes on."""
        new = self._show(num_kept, is_final=True)
        kept = self._window[len(self._window) - num_kept :]
        self._window = self._tokens.restart()
        self._num_shown = len(self._tokens.decode(self._window))
        self._window += kept
        self._run.num_bytes = num_kept
        self._is_run_of_prompt = False
        return new

    def _show(self, num_held: int, is_final: bool) -> str:
        """Return the new text, without the last ``num_held`` tokens."""
        text = self._tokens.decode(self._window[: len(self._window) - num_held])
        # Incomplete UTF-8 at the end decodes to one U+FFFD.
        end = len(text) - (not is_final and text.endswith(_REPLACEMENT))
        new = text[self._num_shown : end]
        self._num_shown = max(self._num_shown, end)
        return new

    def _trim(self) -> None:
        """Forget tokens on which no further text depends."""
        num_decoded = len(self._window) - self._run.num_bytes
        if num_decoded <= 2 * _NUM_CONTEXT_TOKENS:
            return
        num_cut = num_decoded - _NUM_CONTEXT_TOKENS
        before = len(self._tokens.decode(self._window[:num_decoded]))
        after = len(self._tokens.decode(self._window[num_cut:num_decoded]))
        self._num_shown += after - before
        del self._window[:num_cut]


class _ByteRun:
    """Byte tokens in a row: complete characters, then at most one incomplete one."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.is_broken = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")

    @property
    def num_incomplete(self) -> int:
        """Bytes of the incomplete character at the end."""
        return len(self._utf8.getstate()[0])

    def add(self, byte: int) -> None:
        """Add a byte; find out whether the run is still UTF-8."""
        self.num_bytes += 1
        try:
            self._utf8.decode(bytes([byte]))
        except UnicodeDecodeError:
            self.is_broken = True


class ByteDecoder:
    """Decodes tokens 0 to 255 as UTF-8 bytes; other tokens have no text."""

    def __init__(self) -> None:
        """Start an output."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, tokens: Sequence[int]) -> str:
        """Add ``tokens`` and return the new text that is final."""
        return self._decoder.decode(bytes(token for token in tokens if token < 256))

    def pending(self) -> str:
        """Return an empty text: only incomplete characters are held back."""
        return ""

    def finish(self) -> str:
        """Return the text that was held back."""
        return self._decoder.decode(b"", final=True)


class NoDecoder:
    """Gives every output an empty text."""

    def feed(self, tokens: Sequence[int]) -> str:
        """Return an empty text."""
        return ""

    def pending(self) -> str:
        """Return an empty text."""
        return ""

    def finish(self) -> str:
        """Return an empty text."""
        return ""
