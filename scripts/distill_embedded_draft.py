"""Trains the embedded draft model: `generate`, `cut`, `train`, `measure`, in this order.

    export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000
    python scripts/distill_embedded_draft.py generate DATA --minutes 25
    python scripts/distill_embedded_draft.py cut DATA
    python scripts/distill_embedded_draft.py train DATA --minutes 16
    python scripts/distill_embedded_draft.py measure HumanEval.jsonl.gz questions.jsonl ANSWERS

`generate` lets the verify model write text and keeps its distribution at each token. `cut` makes
an untrained draft, two layers of the verify model, and `train` distils into such a cut. The result
is amusd/pair/assets/smollm2-draft.safetensors. No evaluation set is used for training.

The first line makes glibc keep freed memory: without it, most of the time goes into page faults
(training took six times as long).
"""

import gzip
import json
import random
import tempfile
import time
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from distill_prompts import KINDS, PROGRAM_STARTS, TURN_STARTS, library_prompts, task_prompts
from distill_student import batches
from distill_student import train as train_body
from distill_teacher import Teacher, Written
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from amusd.engine.reduced_head import load_causal_lm
from amusd.pair import SMOLLM2
from amusd.pair.cache import cache_root
from amusd.pair.checkpoint import TokenIds
from amusd.pair.draft import ASSET_PATH, ensure_draft, save_asset
from amusd.pair.verify import ensure_verify

app = typer.Typer(add_completion=False, no_args_is_help=True)

BATCH_ROWS = 128
HEAD_TOKENS = 44  # of a user turn or a program that the verify model starts by itself
ANSWER_TOKENS = 128
HEAD_SIZE = 8192
HELD_OUT_TOKENS = 96
PROMPT_LIMIT = 160


@app.command()
def generate(folder: Path, minutes: float = 25, seed: int = 0) -> None:
    """Write one file of prompts, answers and soft targets after another into FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    verify = verify_folder()
    author = Author(Teacher(verify), AutoTokenizer.from_pretrained(verify), random.Random(seed))
    for number in count():
        if time.monotonic() > deadline:
            return
        began = time.monotonic()
        written = author.batch(KINDS[number % len(KINDS)])
        save_batch(folder / f"{seed:03}-{number:05}.npz", written)
        num_tokens = sum(len(item.tokens) for item in written)
        print(number, num_tokens, f"{num_tokens / (time.monotonic() - began):.0f} tokens/s")


class Author:
    """Makes prompts of one kind at a time and has the teacher answer them."""

    def __init__(
        self, teacher: Teacher, tokenizer: PreTrainedTokenizerBase, rng: random.Random
    ) -> None:
        self._teacher, self._tokenizer, self._rng = teacher, tokenizer, rng
        marker = "\0"
        self._before_turn, self._after_turn = as_user_turn(tokenizer, marker).split(marker)
        self._tasks, self._library = task_prompts(rng), library_prompts(rng)

    def batch(self, kind: str) -> list[Written]:
        """Prompts of one kind, answered; seven in ten greedily, since acceptance is greedy."""
        temperatures = [
            0.0 if self._rng.random() < 0.7 else self._rng.uniform(0.7, 1.0)
            for _ in range(BATCH_ROWS)
        ]
        return self._teacher.write(self._prompts(kind), temperatures, ANSWER_TOKENS)

    def _prompts(self, kind: str) -> list[list[int]]:
        if kind == "chat":
            starts = self._rng.choices(TURN_STARTS, k=BATCH_ROWS)
            heads = self._start([self._before_turn + start for start in starts])
            after = self._encode(self._after_turn)
            return [_until(head, after[0]) + after for head in heads]
        if kind == "program":
            return self._start(self._rng.choices(PROGRAM_STARTS, k=BATCH_ROWS))
        if kind == "task":
            turns = islice(self._tasks, BATCH_ROWS)
            return [self._encode(self._before_turn + t + self._after_turn) for t in turns]
        return [self._encode(text)[:PROMPT_LIMIT] for text in islice(self._library, BATCH_ROWS)]

    def _start(self, texts: list[str]) -> list[list[int]]:
        prompts = [self._encode(text) for text in texts]
        heads = self._teacher.write(prompts, [0.9] * len(prompts), HEAD_TOKENS)
        return [head.prompt + head.tokens for head in heads]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text).input_ids
        return ids


def _until(tokens: list[int], stop: int) -> list[int]:
    # The system turn ends with the same token; only what comes last is cut.
    return tokens[:-1] if tokens[-1] == stop else tokens


def save_batch(path: Path, batch: list[Written]) -> None:
    """Write a batch as flat arrays; the answers' lengths split them again."""
    np.savez(
        path,
        prompt_lengths=np.array([len(item.prompt) for item in batch], np.int32),
        answer_lengths=np.array([len(item.tokens) for item in batch], np.int32),
        tokens=np.concatenate([np.array(w.prompt + w.tokens, np.int32) for w in batch]),
        top_ids=np.concatenate([w.top_ids.numpy() for w in batch]),
        top_logprobs=np.concatenate([w.top_logprobs.numpy() for w in batch]),
    )


@app.command()
def cut(data: Path, layers: str = "0,1", out: Path = ASSET_PATH) -> None:
    """Make an untrained draft: LAYERS of the verify model, head tokens by frequency in DATA."""
    verify = verify_folder()
    chosen = [int(layer) for layer in layers.split(",")]
    body: dict[str, np.ndarray[Any, Any]] = {}
    with safe_open(verify / "model.safetensors", framework="numpy") as weights:
        for name in weights.offset_keys():
            for position, layer in enumerate(chosen):
                if name.startswith(f"model.layers.{layer}."):
                    target = name.replace(f".{layer}.", f".{position}.", 1)
                    body[target] = weights.get_tensor(name)
        # The verify model's own norm expects what thirty layers have made; with ones, training
        # starts from a smaller error.
        body["model.norm.weight"] = np.ones_like(weights.get_tensor("model.norm.weight"))
        vocab_size = weights.get_slice("model.embed_tokens.weight").get_shape()[0]
    save_asset(out, body, frequent_tokens(data, vocab_size))


def frequent_tokens(data: Path, vocab_size: int) -> TokenIds:
    """The HEAD_SIZE most frequent tokens, most frequent first; ties go to the lower id."""
    counts = np.zeros(vocab_size, np.int64)
    for path in sorted(data.glob("*.npz")):
        counts += np.bincount(np.load(path)["tokens"], minlength=vocab_size)
    return np.argsort(-counts, kind="stable")[:HEAD_SIZE]


@app.command()
def train(
    data: Path, minutes: float = 16, rate: float = 4e-3, seed: int = 0, asset: Path = ASSET_PATH
) -> None:
    """Train the draft in ASSET on DATA and write it back."""
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        draft = ensure_draft(Path(folder, "draft"), verify_folder(), asset)
        model, token_of_row = load_causal_lm(str(draft), torch.float32, "cpu")
    assert token_of_row is not None
    row_of_token = torch.full((model.config.vocab_size,), -1)
    row_of_token[token_of_row] = torch.arange(len(token_of_row))
    rng = random.Random(seed)
    endless = (batch for _ in count() for batch in batches(data, row_of_token, rng))
    num_tokens = train_body(model.train(), endless, 60 * minutes, rate)
    body = {
        name: parameter.detach().numpy()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    save_asset(asset, body, token_of_row.numpy())
    print(f"{num_tokens} tokens seen")


@app.command()
def measure(human_eval: Path, spec_bench: Path, answers: Path, num_prompts: int = 10) -> None:
    """Share of the verify model's greedy tokens that the draft's argmax equals, teacher-forced.

    On the first tokens of its answers to NUM_PROMPTS prompts of each set, which are kept in the
    file ANSWERS. HumanEval prompts are completed as they are, Spec-Bench's first turns are asked.
    """
    if not answers.exists():
        answers.write_text(json.dumps(held_out_answers(human_eval, spec_bench, num_prompts)))
    draft = ensure_draft(cache_root() / SMOLLM2 / "draft", verify_folder())
    model, token_of_row = load_causal_lm(str(draft), torch.float32, "cpu")
    assert token_of_row is not None
    for name, pairs in json.loads(answers.read_text()).items():
        equal: list[bool] = []
        covered: list[bool] = []
        for prompt, answer in pairs:
            with torch.inference_mode():
                rows = model(torch.tensor([prompt + answer])).logits[0].argmax(-1)
            guesses = token_of_row[rows[len(prompt) - 1 : -1]].tolist()
            equal += [a == b for a, b in zip(guesses, answer, strict=True)]
            covered += torch.isin(torch.tensor(answer), token_of_row).tolist()
        print(f"{name}: {np.mean(equal):.1%} of {len(equal)}, head has {np.mean(covered):.1%}")


def held_out_answers(
    human_eval: Path, spec_bench: Path, num_prompts: int
) -> dict[str, list[tuple[list[int], list[int]]]]:
    """Evenly spread prompts of both sets with the float32 verify model's greedy answers."""
    tokenizer = AutoTokenizer.from_pretrained(verify_folder())
    model, _ = load_causal_lm(str(verify_folder()), torch.float32, "cpu")
    with gzip.open(human_eval, "rt", encoding="utf-8") as lines:
        programs = [json.loads(line)["prompt"] for line in lines]
    with spec_bench.open(encoding="utf-8") as lines:
        turns = [as_user_turn(tokenizer, json.loads(line)["turns"][0]) for line in lines]
    return {
        name: [
            (prompt, greedy(model, prompt))
            for prompt in tokenizer(prompts[:: len(prompts) // num_prompts]).input_ids
        ]
        for name, prompts in (("HumanEval", programs), ("Spec-Bench", turns))
    }


def as_user_turn(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The chat template around one user turn, up to where the answer begins."""
    messages = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """The model's greedy answer, at most HELD_OUT_TOKENS."""
    ids = torch.tensor([prompt])
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=HELD_OUT_TOKENS)
    answer: list[int] = text[0, len(prompt) :].tolist()
    return answer


def verify_folder() -> Path:
    """The verify model's folder, converted if need be; there may be no draft yet."""
    return ensure_verify(cache_root() / SMOLLM2 / "verify", progress=True)


if __name__ == "__main__":
    app()
