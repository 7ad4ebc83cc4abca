"""Builds the native runner of a model."""

from collections.abc import Callable

import torch

from amusd.engine.interface import WeightFormat
from amusd.engine.loading.model_source import LoadedModel
from amusd.engine.native.native_model import NativeModel, bytes_per_token, reason_against
from amusd.engine.native.native_runner import NativeRunner
from amusd.engine.runners.runner import RunnerRefusedError
from amusd.engine.sampling.sampler import Sampler

_MIN_CONTEXT = 16  # tokens; the check at start needs a few


def load_native_runner(
    loaded: LoadedModel,
    weights: WeightFormat,
    sampler: Sampler,
    max_context: int = 0,
    tokens_in_cache: Callable[[int], int] | None = None,
) -> NativeRunner:
    """Return a native runner with the weights of ``loaded``.

    It runs sequences of up to ``max_context`` tokens (0: the model's context), and no more than
    ``tokens_in_cache`` finds memory for, by the bytes of each. Its tables are no longer than that.

    Raises:
        RunnerRefusedError: the native engine cannot run the model.
    """
    reason = reason_against(loaded.model)
    if reason is not None:
        raise RunnerRefusedError(reason)
    context = max_context or loaded.description.context_length
    if tokens_in_cache is not None:
        most = tokens_in_cache(bytes_per_token(loaded.model))
        context = max(_MIN_CONTEXT, min(context, most))
    model = NativeModel(loaded.model, weights, sampler.num_outputs, context)
    return NativeRunner(model, sampler, context, torch.get_num_threads())
