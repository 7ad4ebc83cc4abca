"""Chooses how a model is run: which kind of passes fits model, device and options.

Passes that sessions share, if the model can; else one session a pass, and the log says why.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from amusd.core.errors import InvalidInputError
from amusd.engine.alone import AlonePasses, bytes_per_token
from amusd.engine.graphs import CudaGraphs
from amusd.engine.interface import EngineOptions, Numerics
from amusd.engine.memory import free_bytes
from amusd.engine.model_source import LoadedModel
from amusd.engine.native.loading import native_passes
from amusd.engine.native.passes import NativePasses
from amusd.engine.packed import EXACT_ROWS, PackedPasses
from amusd.engine.passes import GreedyHead, Passes
from amusd.engine.probes import MISFITS, same_after_rollback, same_to_the_bit, same_when_shared
from amusd.engine.static_pass import EXACT_WINDOW, Buckets, StaticPasses

log = logging.getLogger(__name__)

_LENGTH_UNIT = 64  # columns of a pool: attention kernels want multiples of 8 and more
_MAX_PROBED_ROWS = 8


@dataclass(frozen=True, slots=True)
class Choice:
    """How an engine runs its model, and what its slots are told about memory, in tokens."""

    passes: Passes[Any]
    max_batch: int
    reuses: bool
    max_tokens: int
    context_length: int
    weight_format: str
    weight_bytes: int
    unit: int = 1


@torch.inference_mode()
def choose_passes(loaded: LoadedModel, options: EngineOptions) -> Choice:
    """Return the fastest way of running the model that fits it and the options.

    Raises:
        InvalidInputError: the model cannot be rolled back, or not be run as the options ask.
    """
    native = native_passes(loaded, options)
    if native is not None:
        return _native(loaded, options, native)
    head = GreedyHead(loaded.head_ids, loaded.num_outputs)
    alone, is_growing = _alone(loaded, head)
    reason = "only the cache of Transformers fits it" if is_growing else _why_alone(loaded.model)
    if options.numerics is Numerics.EXACT:
        return _exact(loaded, options, head, alone, reason or _why_inexact(loaded.model))
    if loaded.model.device.type == "cuda" and reason is None:
        found, reason = _try(lambda: _static(loaded, options, head), alone, loaded)
        if found is not None:
            return found
        log.warning("%s runs without CUDA graphs: %s", loaded.description.name, reason)
        reason = None
    if options.max_batch > 1 and reason is None:
        found, reason = _try(lambda: _packed(loaded, options, head), alone, loaded)
        if found is not None:
            return found
    if options.max_batch > 1:
        log.warning("%s runs one session a pass: %s", loaded.description.name, reason)
    return choice_of(loaded, options, alone, 1, options.reuse_prefixes and not is_growing)


def choice_of(
    loaded: LoadedModel,
    options: EngineOptions,
    passes: Passes[Any],
    max_batch: int,
    reuses: bool,
) -> Choice:
    """Return a choice of passes whose buffers take as much memory as they are asked for."""
    description = loaded.description
    max_tokens = _max_tokens(loaded, options)
    return Choice(
        passes,
        max_batch,
        reuses,
        max_tokens,
        description.context_length,
        weight_format=description.dtype,
        weight_bytes=_weight_bytes(loaded.model),
    )


def _native(loaded: LoadedModel, options: EngineOptions, passes: NativePasses) -> Choice:
    """Return native passes, which are exact as they are."""
    return Choice(
        passes,
        options.max_batch,
        options.reuse_prefixes,
        max_tokens=max(1, _cache_bytes(loaded, options) // passes.bytes_per_token),
        context_length=loaded.description.context_length,
        weight_format=passes.weight_format,
        weight_bytes=passes.weight_bytes,
    )


def _alone(loaded: LoadedModel, head: GreedyHead) -> tuple[AlonePasses, bool]:
    """Return passes of one session each that can be rolled back, and if their cache grows."""
    name, reasons = loaded.description.name, []
    windowed = _sees_a_window(loaded.model)
    for growing in (False, True):
        if growing and windowed:
            break  # that cache forgets what is outside the window, so it cannot be rolled back
        try:
            passes = AlonePasses(loaded.model, head, growing)
            if same_after_rollback(passes, loaded.description.output_size):
                return passes, growing
            reasons.append("it answers differently after its cache is rolled back")
        except MISFITS as error:
            reasons.append(f"{type(error).__name__}: {error}")
    raise InvalidInputError(
        f"{name} cannot be served, for its cache cannot be rolled back (recurrent state?): "
        f"{reasons[0]}; choose a model with attention over all tokens"
    )


def _exact(
    loaded: LoadedModel,
    options: EngineOptions,
    head: GreedyHead,
    alone: AlonePasses,
    reason: str | None,
) -> Choice:
    """Return exact passes, in the one shape that suits the device."""
    found: Choice | None = None
    if reason is None:
        on_cuda = loaded.model.device.type == "cuda"
        make = _static if on_cuda else _packed
        found, reason = _try(lambda: make(loaded, options, head), alone, loaded)
    if found is not None:
        num_places, num_rows = (EXACT_ROWS, 2)
        if isinstance(found.passes, StaticPasses):
            num_places, num_rows = EXACT_WINDOW, min(_MAX_PROBED_ROWS, found.passes.num_rows)
        output_size = loaded.description.output_size
        if same_to_the_bit(found.passes, output_size, num_places, num_rows):
            return found
        reason = "a token's bits depend on its place in a pass or on what is beside it"
    raise InvalidInputError(
        f"numerics exact cannot be promised for {loaded.description.name} in "
        f"{loaded.description.dtype} on {loaded.description.device}: {reason}; use numerics fast, "
        "or another number format or device"
    )


def _try(
    make: Callable[[], Choice], alone: AlonePasses, loaded: LoadedModel
) -> tuple[Choice | None, str]:
    """Return what ``make`` makes if its shared passes agree with ``alone``; else None and why."""
    try:
        choice = make()
        if same_when_shared(choice.passes, alone, loaded.description.output_size):
            return choice, ""
    except MISFITS as error:
        return None, f"{type(error).__name__} in a shared pass: {error}"
    return None, "its answers in shared passes differ from those it gives alone"


def _packed(loaded: LoadedModel, options: EngineOptions, head: GreedyHead) -> Choice:
    exact_rows = EXACT_ROWS if options.numerics is Numerics.EXACT else 0
    passes = PackedPasses(loaded.model, head, exact_rows)
    return choice_of(loaded, options, passes, options.max_batch, options.reuse_prefixes)


def _static(loaded: LoadedModel, options: EngineOptions, head: GreedyHead) -> Choice:
    """Return static passes, all shapes warmed up; captured as graphs on CUDA."""
    num_rows = max(2, options.max_batch)
    context = loaded.description.context_length
    whole = -(-context // _LENGTH_UNIT) * _LENGTH_UNIT
    fitting = _max_tokens(loaded, options) // num_rows // _LENGTH_UNIT * _LENGTH_UNIT
    length = min(whole, fitting)
    if length == 0:
        raise InvalidInputError(
            f"the memory for keys and values has no room for {num_rows} sessions: raise "
            "--cache-mib, or lower --max-batch"
        )
    exact = options.numerics is Numerics.EXACT
    buckets = (Buckets.exact if exact else Buckets.fast)(num_rows, length)
    if loaded.model.device.type == "cuda":
        passes = StaticPasses(loaded.model, buckets, head, CudaGraphs())
    else:
        passes = StaticPasses(loaded.model, buckets, head)
    num_shapes = passes.warm_up()
    log.info("%s: %d pass shapes are ready", loaded.description.name, num_shapes)
    return Choice(
        passes,
        options.max_batch,
        options.reuse_prefixes,
        max_tokens=num_rows * length,
        context_length=min(context, length),
        weight_format=loaded.description.dtype,
        weight_bytes=_weight_bytes(loaded.model),
        unit=length,
    )


def _max_tokens(loaded: LoadedModel, options: EngineOptions) -> int:
    """Return how many tokens' keys and values fit the memory that they may have."""
    num_bytes = _cache_bytes(loaded, options)
    return max(1, num_bytes // bytes_per_token(AlonePasses(loaded.model)))


def _weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of weights that a pass reads: of a table of embeddings only some rows."""
    found = {id(weight): weight.nbytes for weight in model.parameters()}
    table: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None or head.weight is not table.weight:
        found.pop(id(table.weight), None)
    return sum(found.values())


def _cache_bytes(loaded: LoadedModel, options: EngineOptions) -> int:
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
