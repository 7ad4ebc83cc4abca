"""What sampling knows of one sequence: the edits of its logits, at each position.

Rules of this file
- The tokens are those of the sequence's KV cache, which ``append``, ``extend`` and ``truncate``
  follow.
- The edits of a position depend on the tokens before it and on the sampling alone, whatever passes
  they were computed in.
- Positions of the prompt have no edits; no token is chosen there.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from amusd.engine.interface import NO_TOKEN, NOTHING_ALLOWED, Outcome, ScheduledSequence
from amusd.engine.sampling.reference_sampler import LogitEdits, RowSampling
from amusd.engine.sampling.token_edits import (
    BadWords,
    RepeatedNgrams,
    TokenEdits,
    bitmask,
    num_words,
)
from amusd.protocol.errors import AmusdError, InvalidInputError
from amusd.sampling.parameters import Constraint, SequenceSampling

Mask = npt.NDArray[np.uint32]
"""A bitmask over token ids, [vocabulary / 32], lowest bit first."""

_NO_IDS = np.empty(0, dtype=np.int64)
_NO_REPEATS = np.empty(0, dtype=np.bool_)
_NO_OFFSETS = np.empty(0, dtype=np.float32)


class ConstraintMasks(Protocol):
    """Which tokens the constraint of one sequence allows."""

    def masks(self, output: Sequence[int], pending: Sequence[int]) -> list[Mask]:
        """Return the masks behind ``output`` and each of ``pending``, [pending + 1].

        They are valid until the next call.
        """


class ConstraintFactory(Protocol):
    """Makes the state of constraints, for the tokenizer of one model."""

    def prepare(self, constraint: Constraint) -> object:
        """Compile a constraint, on any thread. ``state`` is quick as long as the result is kept.

        Raises:
            AmusdError: the constraint cannot be used.
        """

    def state(self, constraint: Constraint) -> ConstraintMasks:
        """Return the state of a sequence at the begin of its output.

        Raises:
            InvalidInputError: the constraint is not well-formed.
        """


def open_sampler(
    sampling: SequenceSampling,
    vocabulary_size: int,
    constraints: ConstraintFactory | None = None,
    is_draft: bool = False,
) -> "SequenceSampler | None":
    """Return the sampler of a new sequence; None: the largest logit wins, and nothing else counts.

    Raises:
        InvalidInputError: a token id is outside the vocabulary, or the model has no tokenizer for
            a constraint.
    """
    if sampling.is_plain and sampling.logprobs is None:
        return None
    sampling.check_vocabulary(vocabulary_size)
    try:
        masks = _constraint_masks(sampling.parameters.constraint, constraints)
    except AmusdError:
        if not is_draft:
            raise
        masks = None  # its proposals are right less often
    return SequenceSampler(sampling, vocabulary_size, masks, is_draft)


def _constraint_masks(
    constraint: Constraint | None, constraints: ConstraintFactory | None
) -> ConstraintMasks | None:
    if constraint is None:
        return None
    if constraints is None:
        raise InvalidInputError(
            "this model has no tokenizer to constrain its output with: leave the constraint out"
        )
    return constraints.state(constraint)


class SequenceSampler:
    """The tokens of one sequence, and the edits that follow from them."""

    def __init__(
        self,
        sampling: SequenceSampling,
        vocabulary_size: int,
        constraint: ConstraintMasks | None = None,
        is_draft: bool = False,
    ) -> None:
        """Start without tokens; ``open_sampler`` checks the arguments.

        With ``is_draft``, an output that has no allowed token is any token.
        """
        parameters = sampling.parameters
        self._sampling = sampling
        self._is_draft = is_draft
        self._num_words = num_words(vocabulary_size)
        self._constraint = constraint
        self._allowed = None
        if parameters.allowed_token_ids:
            self._allowed = bitmask(parameters.allowed_token_ids, vocabulary_size)
        self._edits = TokenEdits(parameters)
        self._words = BadWords(parameters.bad_words)
        size = parameters.no_repeat_ngram_size
        self._ngrams = RepeatedNgrams(size) if size else None
        self._follows_tokens = self._edits.follows_output or self._ngrams is not None
        self._fixed = self._edits.arrays()  # as long as nothing follows the tokens
        self._early = [one for one in sampling.banned_token_ids if one < vocabulary_size]
        self._tokens: list[int] = []
        self._length = 0  # of the tokens that are valid; later ones are taken back when needed
        self._last_rows: list[RowSampling] = []

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens without outputs."""
        self._take_back()
        if self._follows_tokens:
            for token in tokens:
                self._push(token)
        else:
            self._tokens.extend(tokens)
        self._length = len(self._tokens)

    def truncate(self, length: int) -> None:
        """Drop the tokens from position ``length`` on, in constant time."""
        self._length = min(self._length, length)

    def append(self, scheduled: ScheduledSequence) -> list[RowSampling]:
        """Add the tokens of the next batch; return the sampling of each of its outputs."""
        num_before = len(scheduled.tokens) - scheduled.num_outputs
        self.extend(scheduled.tokens[:num_before])
        last = scheduled.tokens[num_before:]
        masks = self._masks(self._length + 1, last)
        targets = scheduled.targets or [NO_TOKEN] * scheduled.num_outputs
        rows = []
        for token, target in zip(last, targets, strict=True):
            self._push(token)
            rows.append(self._row(masks, target))
        self._length = len(self._tokens)
        self._last_rows = rows
        return rows

    def outcome(self, outputs: list[int]) -> Outcome:
        """Return what the last batch gives the sequence, from what its rows sampled.

        Outputs behind one that has no allowed token are left out; see ``Engine.run``.
        """
        if NOTHING_ALLOWED not in outputs:
            return outputs
        if self._is_draft:
            pairs = zip(outputs, self._last_rows, strict=True)
            return [_any_token(row) if one == NOTHING_ALLOWED else one for one, row in pairs]
        at = outputs.index(NOTHING_ALLOWED)
        position = self._last_rows[at].edits.position
        if at and position > self._sampling.num_prompt_tokens:
            return outputs[:at]
        return InvalidInputError(
            f"the request allows no token at position {position}: allow more tokens, or ban fewer "
            "(min_tokens, no_repeat_ngram_size, bad_words, logit_bias, constraint)"
        )

    def _push(self, token: int) -> None:
        at = len(self._tokens)
        self._tokens.append(token)
        if not self._follows_tokens:
            return
        is_output = at >= self._sampling.num_prompt_tokens
        if self._edits.follows_output if is_output else self._edits.follows_prompt:
            self._edits.push(token, is_output)
        if self._ngrams is not None:
            self._ngrams.push(self._tokens, at)

    def _take_back(self) -> None:
        if not self._follows_tokens:
            del self._tokens[self._length :]
        while len(self._tokens) > self._length:
            at = len(self._tokens) - 1
            if self._ngrams is not None:
                self._ngrams.pop(self._tokens, at)
            token = self._tokens.pop()
            is_output = at >= self._sampling.num_prompt_tokens
            if self._edits.follows_output if is_output else self._edits.follows_prompt:
                self._edits.pop(token, is_output)

    def _masks(self, first: int, tokens: Sequence[int]) -> dict[int, Mask]:
        """Return the allowed tokens of the positions from ``first`` on, behind each of ``tokens``.

        A position without a mask allows all.
        """
        start = self._sampling.num_prompt_tokens
        positions = range(max(first, start), first + len(tokens))
        if not positions:
            return {}
        if self._constraint is None:
            return {} if self._allowed is None else dict.fromkeys(positions, self._allowed)
        text = [*self._tokens[start:], *tokens[max(0, start - first + 1) :]]
        num_output = positions[0] - start
        masks = self._constraint.masks(text[:num_output], text[num_output:])
        return dict(zip(positions, map(self._fitted, masks), strict=True))

    def _fitted(self, mask: Mask) -> Mask:
        """Return a constraint's mask with a word for each 32 tokens of the model's vocabulary."""
        if len(mask) != self._num_words:
            longer = np.zeros(self._num_words, dtype=np.uint32)
            shared = min(len(mask), self._num_words)
            longer[:shared] = mask[:shared]
            mask = longer
        return mask if self._allowed is None else mask & self._allowed

    def _row(self, masks: dict[int, Mask], target: int) -> RowSampling:
        """Return the sampling of the position behind all tokens."""
        sampling, position = self._sampling, len(self._tokens)
        if position < sampling.num_prompt_tokens:
            edits = LogitEdits(position, _NO_IDS, _NO_REPEATS, _NO_OFFSETS)
        else:
            edits = self._edits_at(position, masks.get(position))
        return RowSampling(sampling.parameters, edits, sampling.logprobs, target)

    def _edits_at(self, position: int, allowed: Mask | None) -> LogitEdits:
        known, banned = self._edits, self._banned(position)
        if not banned and not self._follows_tokens:
            return LogitEdits(position, *self._fixed, allowed)
        ids, is_repeated, offsets = known.arrays()
        if known.follows_output:  # the next tokens change them
            is_repeated, offsets = is_repeated.copy(), offsets.copy()
        if banned:
            places = {token: known.index_of(token) for token in banned}
            more = [token for token, at in places.items() if at is None]
            offsets = np.concatenate([offsets, np.full(len(more), -np.inf, dtype=np.float32)])
            offsets[[at for at in places.values() if at is not None]] = -np.inf
            is_repeated = np.concatenate([is_repeated, np.zeros(len(more), dtype=np.bool_)])
            ids = np.concatenate([ids, np.array(more, dtype=np.int64)])
        return LogitEdits(position, ids, is_repeated, offsets, allowed)

    def _banned(self, position: int) -> list[int]:
        """Return the tokens that are banned at a position alone."""
        banned = list(self._early) if position < self._sampling.min_position else []
        if self._words:
            start = self._sampling.num_prompt_tokens
            banned += self._words.banned(self._tokens, start, position)
        if self._ngrams is not None:
            banned += self._ngrams.banned(self._tokens, position)
        return banned


def _any_token(row: RowSampling) -> int:
    """Return the lowest token of the mask: the only one that fits where it is forced."""
    allowed = row.edits.allowed
    if allowed is None or not allowed.any():
        return 0
    word = int(np.flatnonzero(allowed)[0])
    bits = int(allowed[word])
    return 32 * word + (bits & -bits).bit_length() - 1
