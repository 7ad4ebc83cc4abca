"""Chooses how a model is run: which kind of passes fits model, device and options.

ModelRunner that sessions share, if the model can; else one session a pass, and the log says why.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from amusd.engine.interface import EngineOptions, Numerics
from amusd.engine.kv.free_memory import free_bytes
from amusd.engine.loading.model_source import LoadedModel
from amusd.engine.native.native_loading import native_runner
from amusd.engine.native.native_runner import NativeRunner
from amusd.engine.runners.graph_capture import CudaGraphs, direct
from amusd.engine.runners.padded import EXACT_WINDOW, Buckets, PaddedRunner
from amusd.engine.runners.ragged import RaggedRunner, exact_rows
from amusd.engine.runners.runner import ModelRunner
from amusd.engine.runners.self_check import (
    MISFITS,
    same_after_rollback,
    same_to_the_bit,
    same_when_batched,
)
from amusd.engine.runners.unbatched import UnbatchedRunner, bytes_per_token
from amusd.engine.sampling.sampler import Sampler
from amusd.protocol.errors import InvalidInputError

log = logging.getLogger(__name__)

_LENGTH_UNIT = 64  # columns of a pool: attention kernels want multiples of 8 and more
_MAX_PROBED_ROWS = 8


@dataclass(frozen=True, slots=True)
class RunnerSelection:
    """How an engine runs its model, and what its slots are told about memory, in tokens.

    A pass reads ``weight_bytes`` of weights, which are kept as ``weight_format``.
    """

    passes: ModelRunner[Any]
    max_batch: int
    reuses: bool
    max_tokens: int
    context_length: int
    unit: int = 1
    weight_format: str = ""
    weight_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Case:
    """What a choice is made for: ``alone`` is what the model can do in any case."""

    loaded: LoadedModel
    options: EngineOptions
    sampler: Sampler
    alone: UnbatchedRunner
    max_tokens: int

    @property
    def name(self) -> str:
        return self.loaded.description.name

    @property
    def is_exact(self) -> bool:
        return self.options.numerics is Numerics.EXACT

    @property
    def on_cuda(self) -> bool:
        return self.loaded.model.device.type == "cuda"

    def choice(
        self, passes: ModelRunner[Any], max_batch: int, reuses: bool = True
    ) -> RunnerSelection:
        """Return a choice of passes whose buffers take as much memory as they are asked for."""
        context = self.loaded.description.context_length
        reuses = reuses and self.options.reuse_prefixes
        return RunnerSelection(
            passes, max_batch, reuses, self.max_tokens, context, 1, *self.weights
        )

    @property
    def weights(self) -> tuple[str, int]:
        """Format and bytes of the weights that a pass reads."""
        return self.loaded.description.dtype, _weight_bytes(self.loaded.model)


@torch.inference_mode()
def select_runner(loaded: LoadedModel, options: EngineOptions) -> RunnerSelection:
    """Return the fastest way of running the model that fits it and the options.

    Raises:
        InvalidInputError: the model cannot be rolled back, or not be run as the options ask.
    """
    sampler = Sampler(loaded.head_ids, loaded.num_outputs)
    native = native_runner(loaded, options, sampler)
    if native is not None:
        return _native(loaded, options, native)
    alone = _alone(loaded, sampler)
    max_tokens = max(1, _cache_bytes(loaded, options) // bytes_per_token(alone))
    case = _Case(loaded, options, sampler, alone, max_tokens)
    reason = "only the cache of Transformers fits it" if alone.growing else _why_alone(loaded.model)
    if case.is_exact:
        return _exact(case, reason or _why_inexact(loaded.model))
    return _fast(case, reason)


def _native(loaded: LoadedModel, options: EngineOptions, passes: NativeRunner) -> RunnerSelection:
    """Return native passes, which are exact as they are."""
    return RunnerSelection(
        passes,
        options.max_batch,
        options.reuse_prefixes,
        max(1, _cache_bytes(loaded, options) // passes.bytes_per_token),
        loaded.description.context_length,
        weight_format=passes.weight_format,
        weight_bytes=passes.weight_bytes,
    )


def _fast(case: _Case, reason: str | None) -> RunnerSelection:
    """Return passes that sessions share, unless there is a reason against; else lone ones."""
    found: RunnerSelection | None = None
    if case.on_cuda and reason is None:
        found, against = _try(_static, case)
        if found is None:
            log.warning("%s runs without CUDA graphs: %s", case.name, against)
    if found is None and case.options.max_batch > 1:
        if reason is None:
            found, reason = _try(_packed, case)
        if found is None:
            log.warning("%s runs one session a pass: %s", case.name, reason)
    return found or case.choice(case.alone, 1, reuses=not case.alone.growing)


def _exact(case: _Case, reason: str | None) -> RunnerSelection:
    """Return exact passes, in the shape that suits the device."""
    found: RunnerSelection | None = None
    if reason is None:
        found, reason = _try(_static if case.on_cuda else _packed, case)
    description = case.loaded.description
    if found is not None:
        num_places, num_buffers = exact_rows(case.loaded.model.dtype), 2
        if isinstance(found.passes, PaddedRunner):
            num_places, num_buffers = EXACT_WINDOW, min(_MAX_PROBED_ROWS, found.passes.num_rows)
        if same_to_the_bit(found.passes, description.output_size, num_places, num_buffers):
            return found
        reason = "a token's bits depend on its place in a pass or on what is beside it"
    raise InvalidInputError(
        f"numerics exact cannot be promised for {description.name} in {description.dtype} on "
        f"{description.device}: {reason}; use numerics fast, or another number format or device"
    )


def _alone(loaded: LoadedModel, sampler: Sampler) -> UnbatchedRunner:
    """Return passes of one session each that can be rolled back."""
    reasons = []
    for growing in (False, True):
        if growing and _sees_a_window(loaded.model):
            break  # that cache forgets what is outside the window, so it cannot be rolled back
        try:
            passes = UnbatchedRunner(loaded.model, sampler, growing)
            if same_after_rollback(passes, loaded.description.output_size):
                return passes
            reasons.append("it answers differently after its cache is rolled back")
        except MISFITS as error:
            reasons.append(f"{type(error).__name__}: {error}")
    raise InvalidInputError(
        f"{loaded.description.name} cannot be served, for its cache cannot be rolled back "
        f"(recurrent state?): {reasons[0]}; choose a model with attention over all tokens"
    )


def _try(
    make: Callable[[_Case], RunnerSelection], case: _Case
) -> tuple[RunnerSelection | None, str]:
    """Return what ``make`` makes if it gives the answers of lone passes; else None and why not."""
    try:
        choice = make(case)
        if same_when_batched(choice.passes, case.alone, case.loaded.description.output_size):
            return choice, ""
    except MISFITS as error:
        return None, f"{type(error).__name__} in a shared pass: {error}"
    return None, "its answers in shared passes differ from those it gives alone"


def _packed(case: _Case) -> RunnerSelection:
    num_rows = exact_rows(case.loaded.model.dtype) if case.is_exact else 0
    passes = RaggedRunner(case.loaded.model, case.sampler, num_rows)
    return case.choice(passes, case.options.max_batch)


def _static(case: _Case) -> RunnerSelection:
    """Return static passes, all shapes warmed up; captured as graphs on CUDA."""
    num_rows = max(2, case.options.max_batch)
    context = case.loaded.description.context_length
    whole = -(-context // _LENGTH_UNIT) * _LENGTH_UNIT
    length = min(whole, case.max_tokens // num_rows // _LENGTH_UNIT * _LENGTH_UNIT)
    if length == 0:
        raise InvalidInputError(
            f"the memory for keys and values has no room for {num_rows} sessions: raise "
            "--cache-mib, or lower --max-batch"
        )
    buckets = (Buckets.exact if case.is_exact else Buckets.fast)(num_rows, length)
    capture = CudaGraphs(case.loaded.model.device) if case.on_cuda else direct
    passes = PaddedRunner(case.loaded.model, buckets, case.sampler, capture)
    log.info("%s: %d shapes of passes are ready", case.name, passes.warm_up())
    return RunnerSelection(
        passes,
        case.options.max_batch,
        case.options.reuse_prefixes,
        num_rows * length,
        min(context, length),
        length,
        *case.weights,
    )


def _weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of weights that a pass reads: of a table of embeddings only some rows."""
    found = {id(weight): weight.nbytes for weight in model.parameters()}
    table: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None or head.weight is not table.weight:
        found.pop(id(table.weight), None)
    return sum(found.values())


def _cache_bytes(loaded: LoadedModel, options: EngineOptions) -> int:
    """Return how much memory keys and values may take."""
    return options.cache_mib << 20 or free_bytes(loaded.description.device) // 2


def _why_alone(model: PreTrainedModel) -> str | None:
    """Return why sessions cannot share passes, as far as the configuration tells."""
    if _sees_a_window(model):
        return "some of its layers attend to a window only"
    way = model.config._attn_implementation
    return None if way == "sdpa" else f"its attention is {way}, not sdpa"


def _why_inexact(model: PreTrainedModel) -> str | None:
    """Return why bits depend on a token's companions, where a probe might not notice."""
    config = model.config.get_text_config()
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if (getattr(config, name, None) or 0) > 1:
            return "how many tokens of a pass an expert gets depends on all of them"
    return None


def _sees_a_window(model: PreTrainedModel) -> bool:
    """Whether some layer attends to less than all tokens before."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None
