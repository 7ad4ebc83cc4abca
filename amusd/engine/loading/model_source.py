"""Loads a model of Transformers, and describes it for an engine."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from amusd.engine.loading.context_length import context_length
from amusd.engine.loading.reduced_head import load_causal_lm
from amusd.engine.loading.weights_fingerprint import weights_fingerprint
from amusd.fleet.model_description import ModelDescription
from amusd.fleet.vocabulary import Vocabulary
from amusd.library_output import cause_of
from amusd.protocol.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What to load and how: a hub id or folder, the device and the dtype."""

    name: str
    location: str
    device: str = "cpu"
    dtype: str = "auto"

    def torch_dtype(self) -> torch.dtype:
        """Return the dtype; ``auto`` is float32 on CPU and bfloat16 elsewhere."""
        name = self.dtype
        if name == "auto":
            name = "float32" if self.device == "cpu" else "bfloat16"
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise InvalidInputError(
                f"unknown dtype {self.dtype!r}: use auto, float32, bfloat16 or float16"
            )
        return dtype


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on its device, and what an engine needs to know about it.

    ``head_ids`` has the token id of each row of a reduced head, ``[head]`` int64. Only the first
    ``num_outputs`` rows of the head are sampled; None: all.
    """

    model: PreTrainedModel
    description: ModelDescription
    head_ids: Tensor | None = None
    num_outputs: int | None = None


def load_source(source: ModelSource, known_tokens_only: bool = False) -> LoadedModel:
    """Load a model and describe it.

    Args:
        source: what to load.
        known_tokens_only: never sample an id outside the tokenizer (a padded head has some). A
            draft needs this because the verify model may not know the id.

    Raises:
        InvalidInputError: the model does not exist or cannot be loaded.
    """
    dtype = source.torch_dtype()
    folder = Path(source.location)
    if (folder.is_absolute() or source.location.startswith(".")) and not folder.is_dir():
        raise InvalidInputError(
            f"there is no model folder {source.location}: give one with config.json, safetensors "
            "and a tokenizer, or a hub id"
        )
    try:
        model, head_ids = load_causal_lm(source.location, dtype, torch.device(source.device))
        tokenizer = AutoTokenizer.from_pretrained(source.location)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise InvalidInputError(
            f"cannot load model {source.name!r} on {source.device}: "
            f"{cause_of(error)}; give a folder with config.json, "
            "safetensors and a tokenizer, or a hub id that can be reached"
        ) from error
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return LoadedModel(
        model,
        _describe(model, source, Vocabulary.of(tokens)),
        head_ids,
        len(tokenizer) if known_tokens_only and head_ids is None else None,
    )


def _describe(
    model: PreTrainedModel, source: ModelSource, vocabulary: Vocabulary
) -> ModelDescription:
    config = model.config.get_text_config()
    eos = model.generation_config.eos_token_id if model.generation_config else None
    return ModelDescription(
        name=source.name,
        device=str(torch.device(source.device)),
        dtype=str(source.torch_dtype()).removeprefix("torch."),
        num_parameters=sum(weight.numel() for weight in model.parameters()),
        context_length=context_length(model, source.location),
        output_size=int(config.vocab_size),
        vocabulary=vocabulary,
        eos_token_ids=tuple(eos if isinstance(eos, list) else [eos] if eos is not None else []),
        tokenizer=source.name,
        weights_fingerprint=weights_fingerprint(model, config.to_diff_dict()),
    )
