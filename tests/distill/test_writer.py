from pathlib import Path

import pytest
import torch

from amusd.distill.writer import TextWriter
from amusd.engine.loading.reduced_head import load_causal_lm
from tests import tiny

PROMPTS = [[5], [7, 8, 9, 10, 11, 12], list(range(40, 60)), [100, 3]]


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gpt2"])
def test_a_padded_batch_writes_what_generate_writes_for_each_prompt_alone(
    family: str, tmp_path: Path
) -> None:
    model, _ = load_causal_lm(tiny.save(tiny.build(family), tmp_path), torch.float32, "cpu")
    rows = TextWriter(model, stop_ids=[]).write(PROMPTS, [0.0] * 4, 16, seed=1)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        alone = model.generate(  # type: ignore[operator]
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=16,
            do_sample=False,
            pad_token_id=0,
        )
        assert row.prompt == prompt
        assert row.tokens == alone[0, len(prompt) :].tolist()
        assert row.top_ids[:, 0].tolist() == row.tokens


def test_kept_probabilities_are_those_of_the_model(verify_folder: Path, writer: TextWriter) -> None:
    model, _ = load_causal_lm(str(verify_folder), torch.float32, "cpu")
    row = writer.write([PROMPTS[1], PROMPTS[2]], [0.0, 0.9], 6, seed=3)[1]
    with torch.inference_mode():
        logits = model(torch.tensor([row.prompt + row.tokens])).logits[0]
    logprobs = logits[len(row.prompt) - 1 : -1].log_softmax(-1)
    expected = logprobs.gather(1, row.top_ids.long())
    assert torch.allclose(row.top_logprobs.float(), expected, atol=0.02)
    assert torch.equal(expected, expected.sort(descending=True).values)


def test_a_row_ends_with_its_stop_token_and_only_there(verify_folder: Path) -> None:
    model, _ = load_causal_lm(str(verify_folder), torch.float32, "cpu")
    free = TextWriter(model, stop_ids=[]).write(PROMPTS, [0.0] * 4, 12, seed=0)
    stop = free[2].tokens[5]
    rows = TextWriter(model, stop_ids=[stop]).write(PROMPTS, [0.0] * 4, 12, 0, to_the_end=True)
    for row, whole in zip(rows, free, strict=True):
        end = whole.tokens.index(stop) + 1 if stop in whole.tokens else len(whole.tokens)
        assert row.tokens == whole.tokens[:end]
        assert len(row.top_ids) == len(row.top_logprobs) == len(row.tokens)


def test_samples_follow_their_seed_and_vary_with_it(writer: TextWriter) -> None:
    def written(seed: int) -> list[list[int]]:
        return [row.tokens for row in writer.write(PROMPTS, [1.0] * 4, 10, seed)]

    assert written(1) == written(1)
    assert written(1) != written(2)
