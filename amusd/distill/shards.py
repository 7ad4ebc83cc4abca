"""Training data on disk: a folder of shards, and a manifest that names the verify model.

A shard is one safetensors file of flat arrays: ``prompt_lengths`` and ``answer_lengths`` [rows],
``tokens`` [all prompts and answers], ``top_ids`` and ``top_logprobs`` [all answers, K].
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from amusd.distill.files import write_text_whole, write_whole
from amusd.distill.writer import Written
from amusd.protocol.errors import InvalidInputError

_MANIFEST = "manifest.json"
_HELD_OUT = "held-out.safetensors"


@dataclass(frozen=True, slots=True)
class DataManifest:
    """The settings that all shards of a folder share."""

    verify: str
    fingerprint: str
    vocab_size: int
    top_k: int
    answer_tokens: int
    seed: int


class DataFolder:
    """The shards of one verify model. Shards are numbered from 0 and never change."""

    def __init__(self, folder: Path, manifest: DataManifest) -> None:
        """Open ``folder``; create it if it does not exist.

        Raises:
            InvalidInputError: it belongs to another verify model, or has other settings.
        """
        self.folder = folder
        self.manifest = manifest
        path = folder / _MANIFEST
        if path.exists():
            _check_equal(path, manifest)
        else:
            text = json.dumps(asdict(manifest), indent=2) + "\n"
            write_text_whole(path, text)

    @property
    def held_out(self) -> Path:
        """The held-out shard, which training never uses."""
        return self.folder / _HELD_OUT

    def shard(self, number: int) -> Path:
        """Return the path of a shard."""
        return self.folder / f"answers-{number:06}.safetensors"


def save_shard(path: Path, rows: Sequence[Written]) -> None:
    """Write a shard.

    Raises:
        UnavailableError: it cannot be written.
    """
    tensors = {
        "prompt_lengths": torch.tensor([len(row.prompt) for row in rows], dtype=torch.int32),
        "answer_lengths": torch.tensor([len(row.tokens) for row in rows], dtype=torch.int32),
        "tokens": torch.tensor(
            [token for row in rows for token in row.prompt + row.tokens], dtype=torch.int32
        ),
        "top_ids": torch.cat([row.top_ids for row in rows]),
        "top_logprobs": torch.cat([row.top_logprobs for row in rows]),
    }
    write_whole(path, lambda file: save_file(tensors, file))


def load_shard(path: Path) -> list[Written]:
    """Read a shard.

    Raises:
        InvalidInputError: it is missing or damaged.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InvalidInputError(
            f"{path} cannot be read ({error}): delete it; the next run writes it again"
        ) from error
    answers = tensors["answer_lengths"].tolist()
    prompts = tensors["prompt_lengths"].tolist()
    lengths = [p + a for p, a in zip(prompts, answers, strict=True)]
    tokens = [part.tolist() for part in torch.split(tensors["tokens"], lengths)]
    top_ids = torch.split(tensors["top_ids"], answers)
    top_logprobs = torch.split(tensors["top_logprobs"], answers)
    return [
        Written(row[:at], row[at:], ids, logprobs)
        for row, at, ids, logprobs in zip(tokens, prompts, top_ids, top_logprobs, strict=True)
    ]


def _check_equal(path: Path, manifest: DataManifest) -> None:
    try:
        found = DataManifest(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInputError(
            f"{path} cannot be read ({error}): choose another --data folder"
        ) from None
    if found.fingerprint != manifest.fingerprint:
        raise InvalidInputError(
            f"{path.parent} holds text of another verify model ({found.verify}, not "
            f"{manifest.verify}): choose another --data or --output folder"
        )
    differing = [
        name
        for name in ("top_k", "answer_tokens", "seed")
        if getattr(found, name) != getattr(manifest, name)
    ]
    if differing:
        name = differing[0]
        raise InvalidInputError(
            f"{path.parent} has {name} {getattr(found, name)}, not "
            f"{getattr(manifest, name)}: use the same value, or choose another --data folder"
        )
