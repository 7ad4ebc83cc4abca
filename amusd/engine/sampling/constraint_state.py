"""The constraint of one sequence: which tokens may follow each text of its output.

The state follows an output that grows, changes behind a common prefix, or is rolled back. An
end-of-text token ends the output: behind it only end-of-text tokens are allowed.
"""

import time
from collections.abc import Sequence

import llguidance

from amusd.engine.sampling.constraint_grammar import Mask, fill, new_row
from amusd.protocol.errors import InvalidInputError

_MAX_MASK_SECONDS = 0.25


class ConstraintState:
    """Masks of one sequence. It belongs to the engine thread."""

    def __init__(
        self, matcher: llguidance.LLMatcher, mask_of_end: Mask, num_ids: int, vocabulary_size: int
    ) -> None:
        """Start at the beginning of an output.

        Args:
            matcher: at that place; the state copies it.
            mask_of_end: the end-of-text tokens, a mask of ``num_ids`` tokens.
            num_ids: tokens of the matcher's masks.
            vocabulary_size: tokens of the masks that are returned, at most ``num_ids``.
        """
        self._start = matcher
        self._matcher = matcher.deep_copy()
        self._mask_of_end = mask_of_end
        self._num_ids = num_ids
        self._vocabulary_size = vocabulary_size
        self._taken: list[int] = []  # allowed tokens of the last text, end-of-text ones included
        self._num_ends = 0  # end-of-text tokens at its end, which the matcher does not know
        self._rows: list[Mask] = []

    def masks(self, output: Sequence[int], pending: Sequence[int]) -> list[Mask]:
        """Return the masks of the tokens allowed behind ``output`` and each part of ``pending``.

        Args:
            output: tokens of the output so far, without the prompt.
            pending: tokens proposed behind them.

        Returns:
            len(pending) + 1 masks [ceil(vocabulary/32)] uint32: after ``output``, after
            ``output + pending[:1]``, and so on. Behind a token that is not allowed the last mask
            is repeated. They are valid up to the next call.

        Raises:
            InvalidInputError: the constraint is too complex at this place.
        """
        self._return_to(output)
        if not all(map(self._take, output[len(self._taken) :])):
            return [self._mask(0)] * (len(pending) + 1)
        found = [self._mask(0)]
        for token in pending:
            if not self._take(token):
                break
            found.append(self._mask(len(found)))
        return found + found[-1:] * (len(pending) + 1 - len(found))

    def _return_to(self, output: Sequence[int]) -> None:
        """Roll back to the longest prefix that the tokens taken share with ``output``."""
        num_dropped = len(self._taken) - _num_common(self._taken, output)
        if not num_dropped:
            return
        del self._taken[-num_dropped:]
        num_ends = min(self._num_ends, num_dropped)
        self._num_ends -= num_ends
        num_dropped -= num_ends
        if num_dropped and not self._matcher.rollback(num_dropped):
            self._matcher = self._start.deep_copy()
            self._matcher.consume_tokens(self._taken)

    def _take(self, token: int) -> bool:
        """Go on behind ``token`` if it is allowed; return whether it is."""
        if self._is_end(token) and (self._num_ends or self._matcher.is_accepting()):
            self._num_ends += 1
        elif self._num_ends or not self._consume(token):
            return False
        self._taken.append(token)
        return True

    def _consume(self, token: int) -> bool:
        is_token = 0 <= token < self._num_ids
        return is_token and bool(self._matcher.try_consume_tokens([token]))

    def _is_end(self, token: int) -> bool:
        word, bit = divmod(token, 32)
        return 0 <= token < self._num_ids and bool(int(self._mask_of_end[word]) >> bit & 1)

    def _mask(self, index: int) -> Mask:
        """Return the mask behind the tokens taken, in row ``index``."""
        if self._num_ends:
            return self._mask_of_end[: (self._vocabulary_size + 31) // 32]
        if index == len(self._rows):
            self._rows.append(new_row(self._num_ids))
        row = self._rows[index]
        started = time.thread_time()
        reason = fill(self._matcher, row)
        if reason or time.thread_time() - started > _MAX_MASK_SECONDS:
            raise InvalidInputError(
                f"the constraint is too complex after {len(self._taken)} tokens of output: "
                "simplify it"
            )
        return self._cut(row)

    def _cut(self, row: Mask) -> Mask:
        """Drop the tokens that the tokenizer has and the model has not."""
        if self._vocabulary_size == self._num_ids:
            return row
        row = row[: (self._vocabulary_size + 31) // 32]
        if self._vocabulary_size % 32:
            row[-1] &= (1 << self._vocabulary_size % 32) - 1
        if not row.any():
            raise InvalidInputError(
                "the constraint needs a token that the model has not: change the constraint"
            )
        return row


def _num_common(taken: list[int], output: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    most = min(len(taken), len(output))
    if taken[:most] == list(output[:most]):
        return most
    return next(place for place in range(most) if taken[place] != output[place])
