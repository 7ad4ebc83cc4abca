"""The steps from a verify model to a draft: write text, cut, train, measure, save."""

import ctypes
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from amusd.distill import cut
from amusd.distill.batches import Batch, Targets, collate, epoch_batches
from amusd.distill.model_folder import Result, export_folder, write_folder
from amusd.distill.recipe import Recipe
from amusd.distill.shards import DataFolder, DataManifest, load_shard, save_shard
from amusd.distill.text_prompts import PromptSource
from amusd.distill.trainer import Report, Trainer, agreement
from amusd.distill.writer import TextWriter, Written
from amusd.engine.loading.reduced_head import load_causal_lm
from amusd.prompts import Prompt
from amusd.protocol.errors import InvalidInputError

CHECKPOINT_NAME = "checkpoint.safetensors"
_HELD_OUT_ROWS = 96
_HELD_OUT_BATCH = -1  # batch number; training batches count from 0
_GREEDY_SHARE = 0.7  # of the answers; the others are sampled, for variety
_MEASURE_EVERY = 8  # reports between two held-out measurements


class Watcher(Protocol):
    """Receives progress."""

    def wrote(self, num_tokens: int, total: int) -> None:
        """``num_tokens`` answer tokens of ``total`` are on disk."""

    def trained(self, report: Report, total: int) -> None:
        """A report of training, which sees ``total`` tokens in all."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The options of ``amusd distill``; ``draft_vocab`` of 0 keeps the full output head."""

    verify: str
    location: str  # hub id or folder that ``verify`` stands for
    output: Path
    data: Path
    prompts: tuple[Prompt, ...]
    layers: tuple[int, ...]  # empty: the first ``num_layers``
    num_layers: int
    draft_vocab: int
    num_tokens: int
    epochs: int
    made_up_share: float = 0.5
    write_rows: int = 128
    batch_rows: int = 16
    prompt_tokens: int = 160
    answer_tokens: int = 128
    top_k: int = 16
    peak_rate: float = 4e-3
    target_temperature: float = 0.8
    seed: int = 0
    device: str = "cpu"
    licence: str = "other"
    export: Path | None = None


def keep_freed_memory() -> None:
    """Make glibc keep freed memory; otherwise page faults dominate training on CPU."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def distill(plan: Plan, watcher: Watcher) -> Result:
    """Make a draft; resume from what an interrupted call has saved.

    Raises:
        InvalidInputError: the model cannot be cut, or a folder belongs to another model.
        UnavailableError: a file cannot be written.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    verify, _ = load_causal_lm(plan.location, torch.bfloat16, plan.device)
    layers = plan.layers or cut.default_layers(verify.config.num_hidden_layers, plan.num_layers)
    cut.cut(verify, layers, None)  # refuse an unsupported model before hours of writing
    tokenizer = AutoTokenizer.from_pretrained(plan.location)
    manifest = DataManifest(
        verify=plan.verify,
        fingerprint=cut.fingerprint(verify),
        vocab_size=int(verify.config.vocab_size),
        top_k=plan.top_k,
        answer_tokens=plan.answer_tokens,
        seed=plan.seed,
    )
    data = DataFolder(plan.data, manifest)
    text = _write_text(plan, data, verify, tokenizer, watcher)
    head_ids = text.frequent_tokens(plan.draft_vocab)
    # The draft starts from the stored weights, without rounding to 16 bits.
    parent, _ = load_causal_lm(plan.location, torch.float32, "cpu")
    del verify
    draft = cut.cut(parent, layers, head_ids)
    nn.Module.to(draft, plan.device)
    recipe = Recipe(
        verify=plan.verify,
        fingerprint=manifest.fingerprint,
        layers=layers,
        draft_vocab=0 if head_ids is None else len(head_ids),
        num_tokens=plan.num_tokens,
        epochs=plan.epochs,
        batch_rows=plan.batch_rows,
        peak_rate=plan.peak_rate,
        target_temperature=plan.target_temperature,
        max_sequence=plan.prompt_tokens + plan.answer_tokens,
        seed=plan.seed,
    )
    result = _train(plan, recipe, data, text, draft, head_ids, watcher)
    write_folder(plan.output, draft, head_ids, tokenizer, result)
    if plan.export is not None:
        export_folder(plan.export, draft, parent, tokenizer, result)
    return result


@dataclass(slots=True)
class _Text:
    """The shards to train on, with their sizes and token counts."""

    counts: Tensor  # [V], occurrences of each token in prompts and answers
    shards: list[Path] = field(default_factory=list)
    num_rows: int = 0
    num_tokens: int = 0  # of answers

    def add(self, path: Path, rows: Sequence[Written]) -> None:
        """Add a shard."""
        self.shards.append(path)
        self.num_rows += len(rows)
        self.num_tokens += sum(len(row.tokens) for row in rows)
        tokens = torch.tensor([token for row in rows for token in row.prompt + row.tokens])
        self.counts += torch.bincount(tokens, minlength=len(self.counts))

    def frequent_tokens(self, num_tokens: int) -> Tensor | None:
        """Return the ``num_tokens`` most frequent tokens, the most frequent first.

        Ties are in order of the token ids. None stands for all tokens: ``num_tokens`` is 0 or at
        least the size of the vocabulary.
        """
        if not 0 < num_tokens < len(self.counts):
            return None
        return self.counts.argsort(descending=True, stable=True)[:num_tokens].contiguous()


def _write_text(
    plan: Plan, data: DataFolder, verify: PreTrainedModel, tokenizer: Any, watcher: Watcher
) -> _Text:
    """Write shards until there are enough tokens; existing shards are kept."""
    writer = TextWriter(verify, cut.stop_ids(verify, tokenizer), plan.top_k)
    source = PromptSource(tokenizer, plan.prompts, plan.made_up_share, plan.prompt_tokens)
    if not data.held_out.exists():
        save_shard(data.held_out, _held_out(plan, source, writer))
    text = _Text(torch.zeros(data.manifest.vocab_size, dtype=torch.int64))
    while text.num_tokens < plan.num_tokens:
        number = len(text.shards)
        path = data.shard(number)
        if path.exists():
            rows = load_shard(path)
        else:
            rows = _answer(plan, source, writer, number)
            save_shard(path, rows)
        text.add(path, rows)
        watcher.wrote(text.num_tokens, plan.num_tokens)
    if not text.shards:
        raise InvalidInputError("there is no text to train on: raise --tokens")
    return text


def _held_out(plan: Plan, source: PromptSource, writer: TextWriter) -> list[Written]:
    prompts = source.batch(_HELD_OUT_BATCH, _HELD_OUT_ROWS, plan.seed, writer)
    return writer.write(prompts, [0.0] * len(prompts), plan.answer_tokens, plan.seed)


def _answer(plan: Plan, source: PromptSource, writer: TextWriter, number: int) -> list[Written]:
    prompts = source.batch(number, plan.write_rows, plan.seed, writer)
    noise = torch.Generator().manual_seed(plan.seed * 1_000_003 + number)
    draws = torch.rand(len(prompts), 2, generator=noise).tolist()
    temperatures = [0.0 if a < _GREEDY_SHARE else 0.7 + 0.3 * b for a, b in draws]
    return writer.write(prompts, temperatures, plan.answer_tokens, plan.seed * 7_919 + number)


def _train(
    plan: Plan,
    recipe: Recipe,
    data: DataFolder,
    text: _Text,
    draft: PreTrainedModel,
    head_ids: Tensor | None,
    watcher: Watcher,
) -> Result:
    vocab_size = data.manifest.vocab_size
    row_of_token = torch.arange(vocab_size)
    if head_ids is not None:
        row_of_token = torch.full((vocab_size,), -1)
        row_of_token[head_ids] = torch.arange(len(head_ids))
    targets = Targets(row_of_token, recipe.target_temperature, recipe.max_sequence)
    device = torch.device(plan.device)
    total = text.num_tokens * recipe.epochs

    def epochs(epoch: int, skip: int) -> Iterator[Batch]:
        seed = f"{recipe.seed}-{epoch}"
        for batch in epoch_batches(text.shards, targets, recipe.batch_rows, seed, skip):
            yield batch.to(device)

    def held_out() -> float:
        rows = load_shard(data.held_out)
        groups = (rows[i : i + recipe.batch_rows] for i in range(0, len(rows), recipe.batch_rows))
        return agreement(draft, (collate(group, targets).to(device) for group in groups))

    trainer = Trainer(draft, recipe, total)
    checkpoint = plan.output / CHECKPOINT_NAME
    trainer.resume(checkpoint)
    trainer.run(epochs, checkpoint, _reporter(watcher, total, held_out))
    progress = trainer.progress
    return Result(
        recipe=recipe,
        num_parameters=sum(weight.numel() for weight in draft.parameters()),
        num_rows=text.num_rows,
        num_tokens=text.num_tokens,
        num_seen=progress.tokens,
        num_steps=progress.steps,
        held_out=held_out(),
        licence=plan.licence,
    )


def _reporter(
    watcher: Watcher, total: int, held_out: Callable[[], float]
) -> Callable[[Report], None]:
    seen = 0

    def report(found: Report) -> None:
        nonlocal seen
        measured = held_out() if seen % _MEASURE_EVERY == 0 else None
        seen += 1
        watcher.trained(Report(found.progress, found.loss, found.agreement, measured), total)

    return report
