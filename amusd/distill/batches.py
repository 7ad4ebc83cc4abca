"""Training batches from shards: order, padding and targets."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from amusd.distill.shards import load_shard
from amusd.distill.writer import Written

_WINDOW = 32  # shards that are shuffled together; about a million tokens
_SORTED = 16  # batches whose rows are sorted by length together; saves a third of the padding


@dataclass(frozen=True, slots=True)
class Targets:
    """How the tokens of an answer become targets."""

    row_of_token: Tensor  # [V] int64, the head's row of a token, -1 if it has none
    temperature: float  # of the verify model's distribution
    max_tokens: int  # longer sequences are truncated at the start of their prompt


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded on the right, and a target for each answer token."""

    tokens: Tensor  # [B, T]
    rows: Tensor  # [N]
    columns: Tensor  # [N], the position before the predicted token
    targets: Tensor  # [N, K], head rows, -1 if a token is not in the head
    probabilities: Tensor  # [N, K]

    def to(self, device: torch.device) -> "Batch":
        """Return a copy on ``device``."""
        return Batch(*(part.to(device) for part in self._parts()))

    def _parts(self) -> tuple[Tensor, ...]:
        return self.tokens, self.rows, self.columns, self.targets, self.probabilities


def epoch_batches(
    shards: Sequence[Path], targets: Targets, num_rows: int, seed: str, skip: int = 0
) -> Iterator[Batch]:
    """Yield all rows of ``shards`` once, in an order that depends only on ``seed``.

    The first ``skip`` batches are left out.
    """
    rng = random.Random(seed)
    order = list(shards)
    rng.shuffle(order)
    for first in range(0, len(order), _WINDOW):
        rows = [row for path in order[first : first + _WINDOW] for row in load_shard(path)]
        for group in _groups(rows, num_rows, rng):
            if skip:
                skip -= 1
            else:
                yield collate(group, targets)


def collate(group: Sequence[Written], targets: Targets) -> Batch:
    """Pad rows into a batch."""
    sequences = [
        torch.tensor((row.prompt + row.tokens)[-max(targets.max_tokens, len(row.tokens) + 1) :])
        for row in group
    ]
    lengths = [len(row.tokens) for row in group]
    starts = [len(s) - n - 1 for s, n in zip(sequences, lengths, strict=True)]
    heads = targets.row_of_token[torch.cat([row.top_ids for row in group]).long()]
    logprobs = torch.cat([row.top_logprobs for row in group]).float() / targets.temperature
    return Batch(
        tokens=torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True),
        rows=torch.arange(len(group)).repeat_interleave(torch.tensor(lengths)),
        columns=torch.cat([s + torch.arange(n) for s, n in zip(starts, lengths, strict=True)]),
        targets=heads,
        probabilities=logprobs.softmax(-1).masked_fill(heads < 0, 0.0),
    )


def _groups(rows: list[Written], num_rows: int, rng: random.Random) -> Iterator[list[Written]]:
    rng.shuffle(rows)
    size = _SORTED * num_rows
    for pool in (rows[i : i + size] for i in range(0, len(rows), size)):
        pool.sort(key=lambda row: len(row.prompt) + len(row.tokens))
        groups = [pool[i : i + num_rows] for i in range(0, len(pool), num_rows)]
        rng.shuffle(groups)
        yield from groups
