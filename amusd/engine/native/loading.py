"""Decides whether the native engine serves a model, and checks that it does so rightly."""

import logging

import torch
from torch import Tensor
from transformers import PreTrainedModel

from amusd.core.errors import InvalidInputError
from amusd.core.model import ModelDescription
from amusd.engine.interface import EngineOptions, Feed, WeightFormat
from amusd.engine.native.engine import NativeEngine
from amusd.engine.native.model import NativeModel, reason_against

log = logging.getLogger(__name__)

_PROBE = (5, 3, 7, 3, 1, 2, 9)
_TOLERANCE = 1e-3  # of the largest logit; the order of float32 sums makes about 1e-5


def native_engine(
    model: PreTrainedModel,
    description: ModelDescription,
    options: EngineOptions,
    head_ids: Tensor | None = None,
    num_outputs: int | None = None,
) -> NativeEngine | None:
    """Return a native engine with the weights of ``model``, or None if another has to serve it.

    Args:
        model: a model of Transformers, not needed any more afterwards.
        description: what to say about it.
        options: how to run it.
        head_ids: token id of each row of a reduced head, ``[head_rows]``.
        num_outputs: only the first so many rows of the head may come out.

    Raises:
        InvalidInputError: int8 weights are asked for, and only this engine has them.
    """
    reason = reason_against(model)
    if reason is None:
        native = NativeModel(model, options.weights, head_ids, num_outputs)
        engine = NativeEngine(native, description, options, torch.get_num_threads())
        if options.weights is WeightFormat.INT8 or _agrees(engine, model):
            log.info("the native engine serves %s: %s", description.name, native.summary)
            return engine
        reason = "its answers differ from those of Transformers"
        log.warning("the native engine cannot serve %s: %s", description.name, reason)
    if options.weights is WeightFormat.INT8:
        raise InvalidInputError(
            f"--weights int8 needs the native engine, which cannot serve {description.name}: "
            f"{reason}; use --weights compact"
        )
    return None


@torch.inference_mode()
def _agrees(engine: NativeEngine, model: PreTrainedModel) -> bool:
    """Whether the native logits are those of Transformers, but for rounding."""
    tokens = [token % engine.description.output_size for token in _PROBE]
    expected = model(input_ids=torch.tensor([tokens])).logits[0]
    slot = engine.open(len(tokens))
    try:
        found = engine.logits([Feed(slot, tokens, len(tokens))])
    finally:
        engine.close(slot)
    expected = expected[:, : found.shape[1]]
    difference = (found - expected).abs().max()
    return bool(difference <= _TOLERANCE * expected.abs().max())
