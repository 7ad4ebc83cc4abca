"""Measures near ties: the gap between the logits of two tokens after a text."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from amusd.analysis.consistency import Tie
from amusd.engine.loading.model_source import ModelSource, load_source
from amusd.prompts import Prompt, encode


class LogitGapReader:
    """Reads logits of a model of Transformers, in one forward pass over the whole text."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        """Read the logits of ``model`` in its dtype; ``tokenizer`` encodes prompts."""
        self._model = model
        self._tokenizer = tokenizer

    def encode(self, prompt: Prompt) -> list[int]:
        """Return a prompt's token ids."""
        return encode(prompt, self._tokenizer)

    @torch.inference_mode()
    def tie(self, text: Sequence[int], expected: int, found: int) -> Tie:
        """Return the gap of ``expected`` over ``found`` after ``text``, and the dtype's spacing."""
        ids = torch.tensor([list(text)], device=self._model.device)
        logits = self._model(input_ids=ids, logits_to_keep=1).logits[0, -1]  # [vocab]
        one, other = float(logits[expected]), float(logits[found])
        return Tie(one - other, spacing(max(abs(one), abs(other)), logits.dtype))


def spacing(value: float, dtype: torch.dtype) -> float:
    """Return the distance from ``value`` to the next larger number of ``dtype``."""
    limits = torch.finfo(dtype)
    _, exponent = math.frexp(max(abs(value), limits.tiny))
    return math.ldexp(limits.eps, exponent - 1)


def load_gap_reader(name: str, location: str, device: str, dtype: str) -> LogitGapReader:
    """Load the model called ``name`` from ``location``.

    Raises:
        InvalidInputError: it cannot be loaded.
    """
    loaded = load_source(ModelSource(name, location, device, dtype))
    return LogitGapReader(loaded.model, AutoTokenizer.from_pretrained(location))
