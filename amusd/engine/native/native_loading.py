"""Builds the native runner of a model, and checks it against Transformers."""

from collections.abc import Callable

import torch

from amusd.engine.interface import WeightFormat
from amusd.engine.loading.model_source import LoadedModel
from amusd.engine.native.native_model import NativeModel, bytes_per_token, reason_against
from amusd.engine.native.native_runner import NativeRunner
from amusd.engine.runners.runner import Chunk, RunnerRefusedError
from amusd.engine.sampling.sampler import Sampler

_SELF_CHECK = (5, 3, 7, 3, 1, 2, 9)  # tokens
_TOLERANCE = 1e-3  # of the largest logit; the order of float32 sums changes about 1e-5


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
        RunnerRefusedError: the native engine cannot run the model, or gives other results.
    """
    reason = reason_against(loaded.model)
    if reason is not None:
        raise RunnerRefusedError(reason)
    context = max_context or loaded.description.context_length
    if tokens_in_cache is not None:
        context = max(
            len(_SELF_CHECK), min(context, tokens_in_cache(bytes_per_token(loaded.model)))
        )
    model = NativeModel(loaded.model, weights, sampler.num_outputs, context)
    runner = NativeRunner(model, sampler, context, torch.get_num_threads())
    if weights is not WeightFormat.INT8 and not _agrees(runner, loaded):
        raise RunnerRefusedError("its results differ from those of Transformers")
    return runner


@torch.inference_mode()
def _agrees(runner: NativeRunner, loaded: LoadedModel) -> bool:
    """Whether the native logits are those of Transformers, except for rounding."""
    tokens = [token % loaded.description.output_size for token in _SELF_CHECK]
    expected = loaded.model(input_ids=torch.tensor([tokens])).logits[0]
    found = runner.logits([Chunk(runner.allocate(len(tokens)), 0, tokens, len(tokens))])
    difference = (found - expected[:, : found.shape[1]]).abs().max()
    return bool(difference <= _TOLERANCE * expected.abs().max())
