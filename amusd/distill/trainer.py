"""The training loop of a draft on one device: loss, optimisers, learning rate, checkpoints."""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from amusd.distill.batches import Batch
from amusd.distill.cut import output_head, trainable
from amusd.distill.files import write_whole
from amusd.distill.recipe import Recipe
from amusd.protocol.errors import InvalidInputError

_WARM_UP_STEPS = 40
_LAST_RATE = 0.02  # of the peak
_CHECKPOINT_SECONDS = 120.0
_REPORT_STEPS = 25


@dataclass(slots=True)
class Progress:
    """The progress of training; ``tokens`` counts answer tokens, repetitions included."""

    tokens: int = 0
    epoch: int = 0
    batches: int = 0  # of this epoch
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """Mean loss and agreement of the last steps, and the held-out agreement if measured."""

    progress: Progress
    loss: float
    agreement: float
    held_out: float | None = None


def loss_and_hits(draft: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the forward KL from the verify model up to a constant, and where the argmaxes agree.

    This is knowledge distillation (Hinton et al., arXiv 1503.02531) over the stored top tokens.
    Tokens outside the head add nothing. Shapes: a scalar, and [N] bool.
    """
    with torch.autocast(batch.tokens.device.type, torch.bfloat16):
        states = draft.base_model(input_ids=batch.tokens, use_cache=False).last_hidden_state
        logits = output_head(draft)(states[batch.rows, batch.columns])  # [N, H]
    logits = logits.float()
    logprobs = logits.gather(1, batch.targets.clamp(min=0)) - logits.logsumexp(1, keepdim=True)
    loss = -(batch.probabilities * logprobs).sum(1).mean()
    return loss, logits.argmax(1) == batch.targets[:, 0]


@torch.no_grad()
def agreement(draft: PreTrainedModel, batches: Iterator[Batch]) -> float:
    """Return the share of positions where the most likely tokens of both models agree."""
    nn.Module.eval(draft)
    hits = torch.cat([loss_and_hits(draft, batch)[1] for batch in batches])
    nn.Module.train(draft)
    return float(hits.float().mean())


class Trainer:
    """Trains one draft; its checkpoint holds the whole training state."""

    def __init__(self, draft: PreTrainedModel, recipe: Recipe, total_tokens: int) -> None:
        """Prepare to train ``draft`` on its device over ``total_tokens``."""
        self.draft = draft
        self.progress = Progress()
        self._recipe = recipe
        self._total = total_tokens
        self._body = trainable(draft)
        for name, weight in draft.named_parameters():
            weight.requires_grad_(name in self._body)
        rate = recipe.peak_rate
        matrices = [weight for weight in self._body.values() if weight.ndim == 2]
        others = [weight for weight in self._body.values() if weight.ndim != 2]
        # Muon for matrices, as its authors advise; its rate is scaled to AdamW's.
        self._optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def run(
        self,
        epochs: Callable[[int, int], Iterator[Batch]],
        checkpoint: Path,
        report: Callable[[Report], None],
    ) -> None:
        """Train from the current progress to the end of the last epoch.

        ``epochs(epoch, skip)`` returns the batches of an epoch. The checkpoint is written every two
        minutes, at the end, and when an error or Ctrl-C stops training.
        """
        nn.Module.train(self.draft)
        written = time.monotonic()
        recent: list[tuple[float, float]] = []
        try:
            for epoch in range(self.progress.epoch, self._recipe.epochs):
                for batch in epochs(epoch, self.progress.batches):
                    recent.append(self._step(batch))
                    if len(recent) == _REPORT_STEPS:
                        report(_mean(self.progress, recent))
                        recent = []
                    if time.monotonic() - written > _CHECKPOINT_SECONDS:
                        self.save(checkpoint)
                        written = time.monotonic()
                self.progress.epoch, self.progress.batches = epoch + 1, 0
        finally:
            self.save(checkpoint)

    def _step(self, batch: Batch) -> tuple[float, float]:
        rate = self._rate()
        loss, hits = loss_and_hits(self.draft, batch)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(list(self._body.values()), 1.0)
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad()
        self.progress.tokens += len(batch.rows)
        self.progress.batches += 1
        self.progress.steps += 1
        return float(loss.item()), float(hits.float().mean())

    def _rate(self) -> float:
        """Return the learning rate: a linear warm-up, then cosine decay to a fiftieth."""
        done = min(1.0, self.progress.tokens / self._total)
        decay = _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))
        return self._recipe.peak_rate * min(1.0, (self.progress.steps + 1) / _WARM_UP_STEPS) * decay

    def save(self, path: Path) -> None:
        """Write a checkpoint.

        Raises:
            UnavailableError: it cannot be written.
        """
        tensors = {f"weight.{name}": weight.detach() for name, weight in self._body.items()}
        for number, optimiser in enumerate(self._optimisers):
            for index, state in optimiser.state_dict()["state"].items():
                for key, value in state.items():
                    tensors[f"optimiser.{number}.{index}.{key}"] = value
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"recipe": self._recipe.to_json(), "progress": json.dumps(asdict(self.progress))}
        write_whole(path, lambda file: save_file(tensors, file, metadata))

    def resume(self, path: Path) -> None:
        """Resume from a checkpoint if it exists.

        Raises:
            InvalidInputError: it belongs to another recipe, or is damaged.
        """
        if not path.exists():
            return
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
            recipe = Recipe.from_json(metadata["recipe"])
            progress = Progress(**json.loads(metadata["progress"]))
        except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
            raise InvalidInputError(
                f"checkpoint {path} cannot be read ({error}): delete it to train again"
            ) from error
        if recipe.fingerprint != self._recipe.fingerprint:
            raise InvalidInputError(
                f"checkpoint {path} belongs to another verify model ({recipe.verify}, not "
                f"{self._recipe.verify}): choose another --output folder"
            )
        if differing := recipe.difference(self._recipe):
            raise InvalidInputError(
                f"checkpoint {path} has {differing} {getattr(recipe, differing)}, not "
                f"{getattr(self._recipe, differing)}: use the same value, or choose another "
                "--output folder"
            )
        with torch.no_grad():
            for name, weight in self._body.items():
                weight.copy_(tensors[f"weight.{name}"])
        for number, optimiser in enumerate(self._optimisers):
            _restore(optimiser, f"optimiser.{number}.", tensors)
        self.progress = progress


def _restore(optimiser: torch.optim.Optimizer, prefix: str, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            index, _, key = name.removeprefix(prefix).partition(".")
            state.setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict(optimiser.state_dict() | {"state": state})


def _mean(progress: Progress, recent: list[tuple[float, float]]) -> Report:
    losses, hits = zip(*recent, strict=True)
    return Report(progress, sum(losses) / len(losses), sum(hits) / len(hits))
