"""The tokens of a sequence whose logits change: penalties and biases, kept up to date by token.

Rules of this file
- A token costs constant time, to add and to take back.
- Tokens are taken back in the opposite order. So a token that is no longer in the sequence is the
  last one of the arrays.
"""

import math

import numpy as np
import numpy.typing as npt

from amusd.sampling.parameters import SamplingParameters

_FIRST_SIZE = 64


class TokenEdits:
    """Repetition, presence and frequency penalties, ``logit_bias``, and words of one banned token.

    Its arrays have an entry for each token whose logit changes, as ``LogitEdits``.
    """

    def __init__(self, parameters: SamplingParameters) -> None:
        """Start with the biases and bans that hold for the whole sequence."""
        self._presence = parameters.presence_penalty
        self._frequency = parameters.frequency_penalty
        self._is_repeating = parameters.repetition_penalty != 1.0
        self.counts_output = bool(self._presence or self._frequency)
        self._bias = dict(parameters.logit_bias)
        for word in parameters.bad_words:
            if len(word) == 1:
                self._bias[word[0]] = -math.inf
        self._index: dict[int, int] = {}
        self._num_seen: list[int] = []
        self._num_output: list[int] = []
        self._ids = np.empty(_FIRST_SIZE, dtype=np.int64)
        self._is_repeated = np.empty(_FIRST_SIZE, dtype=np.bool_)
        self._offsets = np.empty(_FIRST_SIZE, dtype=np.float32)
        for token in self._bias:
            self._add(token)
        self._num_fixed = len(self._num_seen)

    def arrays(
        self,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
        """Return ids, whether the repetition penalty applies, and offsets; [edits] each.

        They are views, which change with the next token if ``follows_output``.
        """
        size = len(self._num_seen)
        return self._ids[:size], self._is_repeated[:size], self._offsets[:size]

    @property
    def follows_prompt(self) -> bool:
        """Whether tokens of the prompt change anything."""
        return self._is_repeating

    @property
    def follows_output(self) -> bool:
        """Whether tokens of the output change anything."""
        return self._is_repeating or self.counts_output

    def index_of(self, token: int) -> int | None:
        """Return where the arrays have a token; None: nowhere."""
        return self._index.get(token)

    def push(self, token: int, is_output: bool) -> None:
        """Add a token of the sequence."""
        at = self._index.get(token)
        if at is None:
            at = self._add(token)
        self._num_seen[at] += 1
        self._is_repeated[at] = self._is_repeating
        if is_output:
            self._num_output[at] += 1
            self._offsets[at] = self._offset(token, self._num_output[at])

    def pop(self, token: int, is_output: bool) -> None:
        """Take back the last token that was added."""
        at = self._index[token]
        self._num_seen[at] -= 1
        if is_output:
            self._num_output[at] -= 1
            self._offsets[at] = self._offset(token, self._num_output[at])
        if self._num_seen[at]:
            return
        self._is_repeated[at] = False
        if at >= self._num_fixed:
            del self._index[token], self._num_seen[at], self._num_output[at]

    def _add(self, token: int) -> int:
        at = len(self._num_seen)
        if at == len(self._ids):
            self._ids, self._is_repeated, self._offsets = (
                np.concatenate([one, np.empty_like(one)])
                for one in (self._ids, self._is_repeated, self._offsets)
            )
        self._index[token] = at
        self._num_seen.append(0)
        self._num_output.append(0)
        self._ids[at], self._is_repeated[at] = token, False
        self._offsets[at] = self._offset(token, 0)
        return at

    def _offset(self, token: int, num_output: int) -> float:
        """Return what is added to the logit of a token that the output has ``num_output`` times."""
        penalty = self._frequency * num_output + (self._presence if num_output else 0.0)
        return self._bias.get(token, 0.0) - penalty


class RepeatedNgrams:
    """Which tokens would repeat an n-gram of the sequence (``no_repeat_ngram_size``)."""

    def __init__(self, size: int) -> None:
        """Ban n-grams of ``size`` tokens, 1 or more."""
        self._num_before = size - 1
        # Behind each n - 1 tokens: what followed them, and how often.
        self._following: dict[tuple[int, ...], dict[int, int]] = {}

    def push(self, tokens: list[int], at: int) -> None:
        """Add the n-gram that ends with ``tokens[at]``."""
        if at >= self._num_before:
            followers = self._following.setdefault(self._key(tokens, at), {})
            followers[tokens[at]] = followers.get(tokens[at], 0) + 1

    def pop(self, tokens: list[int], at: int) -> None:
        """Take back the n-gram that ends with ``tokens[at]``."""
        if at >= self._num_before:
            key, token = self._key(tokens, at), tokens[at]
            followers = self._following[key]
            followers[token] -= 1
            if not followers[token]:
                del followers[token]
            if not followers:
                del self._following[key]

    def banned(self, tokens: list[int], at: int) -> "dict[int, int] | tuple[()]":
        """Return the tokens that are banned at position ``at``, behind ``tokens[:at]``."""
        return self._following.get(self._key(tokens, at), ()) if at >= self._num_before else ()

    def _key(self, tokens: list[int], at: int) -> tuple[int, ...]:
        return tuple(tokens[at - self._num_before : at])


class BadWords:
    """The last tokens of ``bad_words`` of several tokens, behind the others."""

    def __init__(self, words: tuple[tuple[int, ...], ...]) -> None:
        """Ban each word's last token where the output ends with its others."""
        self._last: dict[tuple[int, ...], list[int]] = {}
        for word in words:
            if len(word) > 1:
                self._last.setdefault(word[:-1], []).append(word[-1])
        self._lengths = sorted({len(prefix) for prefix in self._last})

    def __bool__(self) -> bool:
        """Whether there are such words."""
        return bool(self._last)

    def banned(self, tokens: list[int], start: int, at: int) -> list[int]:
        """Return the tokens that are banned behind the output ``tokens[start:at]``."""
        found: list[int] = []
        for length in self._lengths:
            if at - length < start:
                break
            found += self._last.get(tuple(tokens[at - length : at]), ())
        return found


def bitmask(token_ids: tuple[int, ...], vocabulary_size: int) -> npt.NDArray[np.uint32]:
    """Return the bitmask of token ids, [vocabulary / 32], lowest bit first."""
    bits = np.zeros(num_words(vocabulary_size) * 32, dtype=np.bool_)
    bits[list(token_ids)] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)


def num_words(vocabulary_size: int) -> int:
    """Return the words of a bitmask."""
    return -(-vocabulary_size // 32)
