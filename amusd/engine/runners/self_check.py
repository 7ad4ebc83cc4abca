"""Checks of a model runner at start, for what the name of a model does not tell.

Each check runs a few tokens and returns what it finds. The runner selection decides what follows.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor
from transformers import PreTrainedModel

from amusd.engine.runners.runner import Buffer, Chunk, ModelRunner

MISFITS = (AttributeError, TypeError, ValueError, RuntimeError, LookupError, AssertionError)
"""What a model or a cache raises if they do not fit each other."""

_NUM_TOKENS = 10
_SHORT_LENGTHS = (5, 9)  # of the texts beside the long one
_NUM_ROWS = 8  # compared at the end of each text; on both sides of the last window of the long one
_NUM_WRONG = 5  # tokens that are rolled back
_NUM_REPEATED = 3  # tokens that are computed again at the end


@dataclass(frozen=True, slots=True)
class ExpectedLogits:
    """Texts, and the logits that the model alone has for the last tokens of each.

    The first text is the longest. ``rows[i]`` are the logits of text i, [tokens, head].
    """

    texts: list[list[int]]
    rows: list[Tensor]

    @classmethod
    def of(
        cls, model: PreTrainedModel, output_size: int, length: int, rope_switch: int | None = None
    ) -> "ExpectedLogits":
        """Run the model on each text, without a runner and without a cache.

        Args:
            model: the model.
            output_size: the token ids are below it.
            length: tokens of the longest text.
            rope_switch: texts of up to this length have other rotary factors than longer ones.
        """
        lengths = (length, *(min(length, short) for short in _SHORT_LENGTHS))
        texts = [_text(output_size, seed, count) for seed, count in enumerate(lengths)]
        return cls(texts, [_alone(model, text, rope_switch) for text in texts])


def largest_difference(
    runner: ModelRunner[Buffer], expected: ExpectedLogits, reuses_prefixes: bool
) -> float:
    """Return how far the runner's logits are from the expected ones, relative to their size.

    The texts are computed in chunks, in batches of different lengths, after rollbacks, and with
    ``reuses_prefixes`` after a copied prefix. The difference is that of the worst row: about 1
    for a wrong mask, otherwise about the rounding of the dtype. NaN: some logits are NaN.
    """
    long, short, _ = expected.texts
    half = len(long) // 2
    wrong = long[: min(_NUM_WRONG, len(long) - half)]
    found = _Comparison(runner, expected)
    with _buffers(runner, 1, len(long)) as [first]:
        with _buffers(runner, 1, len(short)) as [second]:
            runner.logits([Chunk(first, 0, long[:half], 0), Chunk(second, 0, short[:2], 0)])
            runner.logits([Chunk(first, half, wrong, 0)])
            found.add((first, 0, half), (second, 1, 2))
        with _buffers(runner, 1, len(expected.texts[2])) as [other]:
            found.add((other, 2, 0), (first, 0, len(long) - _NUM_REPEATED))
        if reuses_prefixes:
            with _buffers(runner, 1, len(long)) as [target]:
                runner.copy(first, target, half)
                found.add((first, 0, len(long) - 1), (target, 0, half))
    return found.worst


class _Comparison(Generic[Buffer]):
    """Runs the rest of texts, and keeps the largest difference of their last rows."""

    def __init__(self, runner: ModelRunner[Buffer], expected: ExpectedLogits) -> None:
        self.worst = 0.0
        self._runner = runner
        self._expected = expected

    def add(self, *parts: tuple[Buffer, int, int]) -> None:
        """Run one batch: the buffer, the index of its text, and the position to run it from."""
        batch, rows = [], []
        for buffer, index, start in parts:
            text, own = self._expected.texts[index], self._expected.rows[index]
            num_outputs = min(len(text) - start, len(own))
            batch.append(Chunk(buffer, start, text[start:], num_outputs))
            rows.append(own[len(own) - num_outputs :])
        error = relative_error(self._runner.logits(batch), torch.cat(rows))
        if not (math.isnan(self.worst) or error <= self.worst):
            self.worst = error


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest distance of two rows, relative to the spread of the expected one.

    Both are [rows, head]. A runner may leave out the last columns. Single logits say little in
    bfloat16: some of them differ by more than 5 % if only the shape of a product changes.
    """
    expected = expected[:, : found.shape[1]].float()
    distance = (found.float() - expected).norm(dim=1)
    spread = (expected - expected.mean(dim=1, keepdim=True)).norm(dim=1)
    return float((distance / spread.clamp(min=torch.finfo(torch.float32).tiny)).max())


def same_to_the_bit(
    runner: ModelRunner[Buffer], output_size: int, num_places: int, num_buffers: int
) -> bool:
    """Whether a token's logits have the same bits at each of ``num_places`` places of a batch.

    The expected logits come from one token a batch. The other places of a batch hold tokens of a
    second sequence. Each time the prefill has other chunks, and another one of ``num_buffers``
    buffers, 2 or more, of another capacity.
    """
    text, companion = (_text(output_size, seed, _NUM_TOKENS) for seed in (3, 4))
    with _buffers(runner, 1) as [buffer]:
        steps = [runner.logits([Chunk(buffer, i, [text[i]], 1)]) for i in range(len(text))]
    expected = torch.cat(steps)
    for place in range(num_places):
        cut = place % (len(text) - 1)
        shift = [companion[i % len(companion)] for i in range(place)]
        with _buffers(runner, num_buffers, _NUM_TOKENS + num_places + place) as buffers:
            mine, other = (buffers[(place + i) % num_buffers] for i in range(2))
            found = [runner.logits([Chunk(mine, 0, text[:cut], cut)])] if cut else []
            beside = [Chunk(other, 0, shift, 0)] if shift else []
            rest = text[cut:]
            found.append(runner.logits([*beside, Chunk(mine, cut, rest, len(rest))]))
        if not torch.equal(torch.cat(found), expected):
            return False
    return True


@contextmanager
def _buffers(
    runner: ModelRunner[Buffer], count: int, capacity: int = _NUM_TOKENS
) -> Iterator[list[Buffer]]:
    buffers = [runner.allocate(capacity) for _ in range(count)]
    try:
        yield buffers
    finally:
        for buffer in buffers:
            runner.free(buffer)


def _text(output_size: int, seed: int, length: int) -> list[int]:
    """Return tokens of the model's vocabulary that differ from seed to seed."""
    return [(seed * 31 + i * i * 7 + i) % output_size for i in range(1, length + 1)]


def _alone(model: PreTrainedModel, text: list[int], rope_switch: int | None) -> Tensor:
    """Return the logits of the last tokens of a text, [tokens, head]."""
    num_rows = min(_NUM_ROWS, len(text))
    if rope_switch is None or len(text) <= rope_switch:
        return _logits(model, text, num_rows)
    num_beyond = min(num_rows, len(text) - rope_switch)
    rows = _logits(model, text, num_beyond)
    if num_beyond == num_rows:
        return rows
    return torch.cat([_logits(model, text[:rope_switch], num_rows - num_beyond), rows])


def _logits(model: PreTrainedModel, text: list[int], num_rows: int) -> Tensor:
    ids = torch.tensor([text], device=model.device)
    logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=num_rows).logits[0]
    return logits[len(logits) - num_rows :]
