from pathlib import Path

import torch

from amusd.distill.batches import Targets, collate, epoch_batches
from amusd.distill.shards import save_shard
from amusd.distill.writer import TextWriter

PROMPTS = [[i, i + 1] * (1 + i % 3) for i in range(10)]


def targets(max_tokens: int = 40) -> Targets:
    row_of_token = torch.full((256,), -1)
    row_of_token[torch.arange(0, 256, 2)] = torch.arange(128)  # even tokens only
    return Targets(row_of_token, 0.8, max_tokens)


def test_a_target_stands_at_the_position_before_its_token(writer: TextWriter) -> None:
    rows = writer.write(PROMPTS[:4], [0.0] * 4, 6, seed=0)
    batch = collate(rows, targets())
    expected = [token for row in rows for token in row.tokens]
    assert batch.tokens[batch.rows, batch.columns + 1].tolist() == expected
    heads = [token // 2 if token % 2 == 0 else -1 for token in expected]
    assert batch.targets[:, 0].tolist() == heads
    assert (batch.probabilities[batch.targets < 0] == 0).all()
    assert (batch.probabilities.sum(1) <= 1.0001).all()


def test_a_long_prompt_loses_its_beginning_and_no_answer_token(writer: TextWriter) -> None:
    rows = writer.write([list(range(30)), [1]], [0.0] * 2, 6, seed=0)
    batch = collate(rows, targets(max_tokens=10))
    assert batch.tokens.shape == (2, 10)
    expected = [token for row in rows for token in row.tokens]
    assert batch.tokens[batch.rows, batch.columns + 1].tolist() == expected


def test_an_epoch_has_every_row_once_and_goes_on_where_it_stopped(
    writer: TextWriter, tmp_path: Path
) -> None:
    paths = [tmp_path / f"{number}" for number in range(3)]
    for number, path in enumerate(paths):
        save_shard(path, writer.write(PROMPTS, [1.0] * 10, 5, seed=number))

    def epoch(seed: str, skip: int = 0) -> list[list[list[int]]]:
        found = epoch_batches(paths, targets(), 4, seed, skip)
        return [batch.tokens.tolist() for batch in found]

    whole = epoch("a")
    assert sum(map(len, whole)) == 30
    assert epoch("a", skip=3) == whole[3:]
    assert epoch("b") != whole
