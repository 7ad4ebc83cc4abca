"""Builds the native runner of a model."""

import torch

from amusd.engine.interface import WeightFormat
from amusd.engine.loading.model_source import LoadedModel
from amusd.engine.native.native_model import NativeModel, reason_against
from amusd.engine.native.native_runner import NativeRunner
from amusd.engine.runners.runner import RunnerRefusedError
from amusd.engine.sampling.sampler import Sampler


def load_native_runner(
    loaded: LoadedModel, weights: WeightFormat, sampler: Sampler
) -> NativeRunner:
    """Return a native runner with the weights of ``loaded``.

    Raises:
        RunnerRefusedError: the native engine cannot run the model.
    """
    reason = reason_against(loaded.model)
    if reason is not None:
        raise RunnerRefusedError(reason)
    context_length = loaded.description.context_length
    model = NativeModel(loaded.model, weights, sampler.num_outputs, context_length)
    return NativeRunner(model, sampler, context_length, torch.get_num_threads())
