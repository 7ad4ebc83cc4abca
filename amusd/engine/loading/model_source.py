"""Loads a model of Transformers, and describes it for an engine."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from amusd.engine.loading.context_length import context_length
from amusd.engine.loading.end_of_text import EndOfText, end_of_text
from amusd.engine.loading.generation_settings import explain_unapplied
from amusd.engine.loading.model_files import ModelFiles, read_model_files
from amusd.engine.loading.reduced_head import load_causal_lm
from amusd.engine.loading.weights_fingerprint import weights_fingerprint
from amusd.fleet.model_description import ModelDescription
from amusd.library_output import root_of
from amusd.protocol.errors import InvalidInputError

log = logging.getLogger(__name__)

_MAX_REASON_CHARACTERS = 300


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
    ``num_outputs`` rows of the head are sampled; None: all. ``remarks`` are for the log.
    """

    model: PreTrainedModel
    description: ModelDescription
    head_ids: Tensor | None = None
    num_outputs: int | None = None
    remarks: tuple[str, ...] = ()


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
        files = read_model_files(source.location, needs_tokenizer_json=not known_tokens_only)
        model, head_ids = load_causal_lm(source.location, dtype, torch.device(source.device))
        end = end_of_text(files, int(model.config.get_text_config().vocab_size))
        description = _describe(model, source, files, end)
    except Exception as error:  # a broken folder raises whatever its content leads to
        log.debug("loading a model failed", exc_info=True)
        raise InvalidInputError(
            f"cannot load model {source.name!r} on {source.device}: {reason_of(error)}; give a "
            "folder with config.json, safetensors and a tokenizer, or a hub id that can be reached"
        ) from error
    num_known = min(files.vocabulary.size, description.output_size)
    return LoadedModel(
        model,
        description,
        head_ids,
        num_known if known_tokens_only and head_ids is None else None,
        () if known_tokens_only else _remarks(model, files, end),
    )


def reason_of(error: BaseException) -> str:
    """Return the message of ``error`` in one line of bounded length."""
    error = root_of(error)
    text = " ".join(str(error).split())
    if not text or isinstance(error, KeyError | AttributeError | TypeError | IndexError):
        text = f"{type(error).__name__} {text}".strip()
    if len(text) > _MAX_REASON_CHARACTERS:
        text = f"{text[:_MAX_REASON_CHARACTERS]}..."
    return text


def _remarks(model: PreTrainedModel, files: ModelFiles, end: EndOfText) -> tuple[str, ...]:
    """Return what the log has to say about a verify model."""
    remarks = list(end.remarks)
    unapplied = explain_unapplied(model.generation_config)
    if unapplied is not None:
        remarks.append(unapplied)
    output_size = int(model.config.get_text_config().vocab_size)
    if files.vocabulary.size > output_size:
        remarks.append(
            f"the tokenizer has ids up to {files.vocabulary.size - 1}, the model only up to "
            f"{output_size - 1}: prompts with the rest are refused"
        )
    return tuple(remarks)


def _describe(
    model: PreTrainedModel, source: ModelSource, files: ModelFiles, end: EndOfText
) -> ModelDescription:
    config = model.config.get_text_config()
    return ModelDescription(
        name=source.name,
        device=str(torch.device(source.device)),
        dtype=str(source.torch_dtype()).removeprefix("torch."),
        num_parameters=sum(weight.numel() for weight in model.parameters()),
        context_length=context_length(model, source.location),
        output_size=int(config.vocab_size),
        vocabulary=files.vocabulary,
        eos_token_ids=end.token_ids,
        tokenizer=source.name,
        weights_fingerprint=weights_fingerprint(model, config.to_diff_dict()),
    )
