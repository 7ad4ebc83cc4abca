"""Decides whether native passes run a model, and checks that they do so rightly."""

import logging

import torch

from amusd.engine.interface import EngineOptions, WeightFormat
from amusd.engine.loading.model_source import LoadedModel
from amusd.engine.native.native_model import NativeModel, reason_against
from amusd.engine.native.native_runner import NativeRunner
from amusd.engine.runners.runner import Chunk
from amusd.engine.sampling.sampler import Sampler
from amusd.protocol.errors import InvalidInputError

log = logging.getLogger(__name__)

_PROBE = (5, 3, 7, 3, 1, 2, 9)
_TOLERANCE = 1e-3  # of the largest logit; the order of float32 sums makes about 1e-5


def native_runner(
    loaded: LoadedModel, options: EngineOptions, sampler: Sampler
) -> NativeRunner | None:
    """Return native passes with the weights of ``loaded``, or None if others have to run it.

    Raises:
        InvalidInputError: int8 weights are asked for, and only native passes have them.
    """
    name = loaded.description.name
    reason = reason_against(loaded.model)
    if reason is None:
        model = NativeModel(loaded.model, options.weights, sampler.num_outputs)
        context_length = loaded.description.context_length
        passes = NativeRunner(model, sampler, context_length, torch.get_num_threads())
        if options.weights is WeightFormat.INT8 or _agrees(passes, loaded):
            log.info("%s runs natively: %s", name, passes.summary)
            return passes
        reason = "its answers differ from those of Transformers"
        log.warning("%s cannot run natively: %s", name, reason)
    if options.weights is WeightFormat.INT8:
        raise InvalidInputError(
            f"8-bit weights (--weights int8) need native passes, which cannot run {name}: "
            f"{reason}; use --weights compact"
        )
    return None


@torch.inference_mode()
def _agrees(passes: NativeRunner, loaded: LoadedModel) -> bool:
    """Whether the native logits are those of Transformers, but for rounding."""
    tokens = [token % loaded.description.output_size for token in _PROBE]
    expected = loaded.model(input_ids=torch.tensor([tokens])).logits[0]
    found = passes.logits([Chunk(passes.make(len(tokens)), 0, tokens, len(tokens))])
    difference = (found - expected[:, : found.shape[1]]).abs().max()
    return bool(difference <= _TOLERANCE * expected.abs().max())
