"""Writes a trained draft as a model folder with a model card, with reduced or full head."""

import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from amusd.distill.cut import output_head, trainable
from amusd.distill.files import write_whole
from amusd.distill.recipe import Recipe
from amusd.pair.checkpoint import HEAD_IDS_NAME, HEAD_SIZE_KEY
from amusd.protocol.errors import InvalidInputError

WEIGHTS_NAME = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a training, for the model card."""

    recipe: Recipe
    num_parameters: int
    num_rows: int  # answers in the training text
    num_tokens: int  # answer tokens in the training text
    num_seen: int  # trained answer tokens, repetitions included
    num_steps: int
    held_out: float
    licence: str


def write_folder(
    folder: Path, draft: PreTrainedModel, head_ids: Tensor | None, tokenizer: Any, result: Result
) -> None:
    """Write a folder that ``amusd serve draft --model`` loads.

    Raises:
        UnavailableError: it cannot be written.
    """
    tensors = _on_cpu(draft.state_dict())
    if head_ids is not None:
        tensors[HEAD_IDS_NAME] = head_ids.cpu()
    _write(folder, draft, draft.config, tensors, tokenizer, result)


def export_folder(
    folder: Path, draft: PreTrainedModel, parent: PreTrainedModel, tokenizer: Any, result: Result
) -> None:
    """Write a folder with the parent's full output head, which Transformers can load.

    Raises:
        InvalidInputError: the folder holds other files.
        UnavailableError: it cannot be written.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / WEIGHTS_NAME).exists():
        raise InvalidInputError(f"{folder} holds other files: export to a new or empty folder")
    body, parent_weights = trainable(draft), parent.state_dict()
    frozen = {name: parent_weights[name].float() for name in draft.state_dict() if name not in body}
    config = copy.deepcopy(draft.config)
    config.__dict__.pop(HEAD_SIZE_KEY, None)
    config.tie_word_embeddings = bool(getattr(parent.config, "tie_word_embeddings", False))
    _write(folder, draft, config, _on_cpu(frozen | body), tokenizer, result)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _write(
    folder: Path,
    draft: PreTrainedModel,
    config: PreTrainedConfig,
    tensors: dict[str, Tensor],
    tokenizer: Any,
    result: Result,
) -> None:
    """Write all files to a temporary folder, then move them into place, the weights last."""
    if config.tie_word_embeddings:  # the head is the embedding, which is already included
        head = output_head(draft)
        heads = {f"{name}.weight" for name, module in draft.named_modules() if module is head}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in heads}

    def write(target: Path) -> None:
        target.mkdir()
        config.save_pretrained(target)
        if draft.generation_config is not None:
            draft.generation_config.save_pretrained(target)
        tokenizer.save_pretrained(target)
        save_file(tensors, target / WEIGHTS_NAME, {"format": "pt"})
        (target / WEIGHTS_NAME).chmod(0o644)
        (target / "README.md").write_text(card(result), encoding="utf-8")

    fresh = folder / "fresh"
    for stale in (fresh, folder / ".fresh.unfinished"):
        shutil.rmtree(stale, ignore_errors=True)
    write_whole(fresh, write)
    names = sorted((path.name for path in fresh.iterdir()), key=lambda n: n == WEIGHTS_NAME)
    for name in names:
        (fresh / name).replace(folder / name)
    fresh.rmdir()


def card(result: Result) -> str:
    """Return a model card in the format of model hubs."""
    recipe = result.recipe
    head = f"the {recipe.draft_vocab} most frequent tokens" if recipe.draft_vocab else "all tokens"
    return f"""---
license: {result.licence}
base_model: {recipe.verify}
tags: [speculative-decoding, draft-model]
---

# A draft model of {recipe.verify}

It drafts for its parent in speculative decoding; used alone it writes poor text. It was made with
`amusd distill`.

| | |
|---|---|
| parent | {recipe.verify} |
| licence | {result.licence}, the licence of the parent; this is a modified part of it |
| layers | {", ".join(map(str, recipe.layers))} of the parent, trained further |
| output head in training | {head} |
| parameters | {result.num_parameters:,} |

## Training

The training text is the parent's own answers to prompts: {result.num_rows:,} answers with
{result.num_tokens:,} tokens. Training took {result.num_steps:,} steps of {recipe.batch_rows}
answers, in all {result.num_seen:,} tokens, repetitions included. The loss is the forward KL
divergence from the parent's most likely tokens at temperature {recipe.target_temperature:g}.
Matrices were trained with Muon, other weights with AdamW, at a peak learning rate of
{recipe.peak_rate:g}. Embedding and head are the parent's.

## Acceptance

On held-out answers of the same kind, {result.held_out:.1%} of the parent's greedy tokens are also
the draft's most likely ones. Measure other prompts with `amusd acceptance`.
"""
