"""The draft model's training: batches of the verify model's text, a loss, an optimiser's loop."""

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROWS = 16  # sequences a step; small, because steps are worth more than rows at this budget
TARGET_TEMPERATURE = 0.8  # sharper than the verify model, since acceptance is greedy
MAX_PROMPT = 120  # longer prompts lose their beginning


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence; the last n of its tokens were written by the verify model."""

    tokens: Tensor  # [T]
    top_ids: Tensor  # [n, K]
    top_logprobs: Tensor  # [n, K]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded on the right, and targets for the positions that predict an answer's token."""

    tokens: Tensor  # [B, T]
    rows: Tensor  # [N]
    columns: Tensor  # [N], the position before the predicted token
    targets: Tensor  # [N, K], head rows, -1 where a token is not in the head
    probabilities: Tensor  # [N, K]


def read_examples(path: Path) -> list[Example]:
    """The sequences of one file that `generate` wrote."""
    data = np.load(path)
    answers = data["answer_lengths"]
    tokens = np.split(data["tokens"], np.cumsum(data["prompt_lengths"] + answers)[:-1])
    ends = np.cumsum(answers)[:-1]
    top = zip(np.split(data["top_ids"], ends), np.split(data["top_logprobs"], ends), strict=True)
    return [
        Example(
            torch.from_numpy(row[-(MAX_PROMPT + len(ids)) :]).long(),
            torch.from_numpy(ids).long(),
            torch.from_numpy(logprobs).float(),
        )
        for row, (ids, logprobs) in zip(tokens, top, strict=True)
    ]


def batches(data: Path, row_of_token: Tensor, rng: random.Random) -> Iterator[Batch]:
    """One pass over all files of `data` in random order; files may be added meanwhile."""
    examples = [item for path in sorted(data.glob("*.npz")) for item in read_examples(path)]
    rng.shuffle(examples)
    # Rows of similar length go together, which saves a third of the padding.
    for pool in (examples[i : i + 16 * ROWS] for i in range(0, len(examples), 16 * ROWS)):
        pool.sort(key=lambda item: len(item.tokens))
        groups = [pool[i : i + ROWS] for i in range(0, len(pool), ROWS)]
        rng.shuffle(groups)
        for group in groups:
            yield collate(group, row_of_token)


def collate(group: list[Example], row_of_token: Tensor) -> Batch:
    """Pad a group; `row_of_token` [V] maps a token to its head row or -1."""
    logprobs = torch.cat([item.top_logprobs for item in group]) / TARGET_TEMPERATURE
    targets = row_of_token[torch.cat([item.top_ids for item in group])]
    starts = [(row, len(item.tokens) - len(item.top_ids)) for row, item in enumerate(group)]
    return Batch(
        tokens=torch.nn.utils.rnn.pad_sequence([item.tokens for item in group], batch_first=True),
        rows=torch.cat([torch.full((len(group[r].top_ids),), r) for r, _ in starts]),
        columns=torch.cat([torch.arange(len(group[r].top_ids)) + at - 1 for r, at in starts]),
        targets=targets,
        probabilities=logprobs.softmax(-1).masked_fill(targets < 0, 0.0),
    )


def loss_and_hits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Forward KL (up to a constant) over the head, and the share of equal greedy tokens."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(batch.tokens, use_cache=False).last_hidden_state  # [B, T, D]
        logits = model.lm_head(hidden[batch.rows, batch.columns])  # [N, H]
    logits = logits.float()
    logprobs = logits.gather(1, batch.targets.clamp(min=0)) - logits.logsumexp(1, keepdim=True)
    loss = -(batch.probabilities * logprobs).sum(1).mean()
    return loss, (logits.argmax(1) == batch.targets[:, 0]).float().mean()


def train(model: Any, steps: Iterator[Batch], seconds: float, peak_rate: float) -> int:
    """Train layers and final norm for `seconds`; embedding and head stay the parent's.

    Returns the number of answer tokens seen, repetitions included.
    """
    model.model.embed_tokens.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    body = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in body if p.ndim == 2]
    optimisers = [
        torch.optim.Muon(matrices, lr=peak_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for p in body if p.ndim < 2], lr=peak_rate, betas=(0.9, 0.95)),
    ]
    began, num_tokens, seen = time.monotonic(), 0, []
    for number, batch in enumerate(steps):
        spent = (time.monotonic() - began) / seconds
        if spent >= 1:
            break
        rate = peak_rate * min(1, (number + 1) / 40) * _decay(spent)
        loss, hits = loss_and_hits(model, batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(body, 1.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad()
        num_tokens += len(batch.rows)
        seen.append((loss.item(), hits.item()))
        if number % 25 == 24:
            mean = np.mean(seen[-25:], axis=0)
            print(f"{number + 1} steps {spent:.0%}: loss {mean[0]:.3f}, greedy {mean[1]:.1%}")
    return num_tokens


def _decay(spent: float) -> float:
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * spent))
