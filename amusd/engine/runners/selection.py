"""Selects the model runner: the fastest one that can run the model as the options ask.

Candidates, fastest first:

    CPU                  native, ragged, unbatched
    CUDA                 padded, ragged, unbatched
    other devices        ragged, unbatched

Numerics exact excludes unbatched everywhere, and ragged on CUDA. Weights in int8 leave native
only. Each candidate either runs the model or refuses with a reason. The selection keeps the
reasons of the faster candidates.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from amusd.engine.interface import EngineOptions, Numerics, WeightFormat
from amusd.engine.kv.free_memory import free_bytes
from amusd.engine.loading.context_length import rope_switch
from amusd.engine.loading.model_source import LoadedModel
from amusd.engine.native.native_loading import load_native_runner
from amusd.engine.runners.finite_check import refuse_not_finite
from amusd.engine.runners.graph_capture import CudaGraphs, direct
from amusd.engine.runners.model_traits import (
    reason_against_batching,
    reason_against_exact,
    reason_against_serving,
    says_encoder,
    uses_sliding_window,
    weight_bytes,
)
from amusd.engine.runners.padded import PaddedRunner
from amusd.engine.runners.ragged import RaggedRunner, exact_pass_tokens
from amusd.engine.runners.rope_switching import RopeSwitchingRunner
from amusd.engine.runners.runner import ModelRunner, RunnerRefusedError
from amusd.engine.runners.runner_check import RunnerCheck, misfits_refused
from amusd.engine.runners.self_check import same_to_the_bit
from amusd.engine.runners.shape_buckets import EXACT_QUERY_LENGTH, Buckets
from amusd.engine.runners.unbatched import UnbatchedRunner, bytes_per_token
from amusd.engine.sampling.sampler import Sampler
from amusd.protocol.errors import InvalidInputError

log = logging.getLogger(__name__)

_LENGTH_UNIT = 64  # columns of a pool: attention kernels want multiples of 8 and more
_MAX_CHECKED_ROWS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerSelection:
    """The runner of a model, why it was selected, and the limits of its KV cache in tokens.

    ``reason`` is one line: why this runner and no faster one. ``unit`` is the granularity of a
    sequence's memory. A forward pass reads ``weight_bytes`` of weights in ``weight_format``.
    ``checked`` is what the self-check found. The runner gives ``num_alternatives`` next-best tokens
    beside an output. ``is_draft`` is that of ``EngineOptions``.
    """

    runner: ModelRunner[Any]
    reason: str
    max_batch: int
    reuse_prefixes: bool
    max_tokens: int
    context_length: int
    unit: int = 1
    weight_format: str = ""
    weight_bytes: int = 0
    checked: str = ""
    num_alternatives: int = 0
    is_draft: bool = False


@torch.inference_mode()
def select_runner(loaded: LoadedModel, options: EngineOptions) -> RunnerSelection:
    """Return the fastest runner that can run the model as the options ask, and log the reason.

    Raises:
        InvalidInputError: the model does not compute finite logits, its cache cannot be rolled
            back, or no runner can run it as the options ask.
    """
    refuse_not_finite(loaded)
    sampler = Sampler(loaded.head_ids, loaded.num_outputs, options.num_alternatives)
    case = _Case(loaded, options, sampler)
    refusals: list[str] = []
    for name in _candidates(case):
        try:
            selection = _BUILDERS[name](case)
        except RunnerRefusedError as refusal:
            refusals.append(f"{name} runner refused: {refusal}")
        else:
            selection = replace(
                selection,
                reason="; ".join(refusals) or selection.reason,
                num_alternatives=options.num_alternatives,
                is_draft=options.is_draft,
            )
            _report(case, selection, logging.WARNING if refusals else logging.INFO)
            return selection
    raise InvalidInputError(_advice(case, "; ".join(refusals)))


@dataclass(frozen=True)
class _Case:
    """What the selection is for."""

    loaded: LoadedModel
    options: EngineOptions
    sampler: Sampler

    @property
    def is_exact(self) -> bool:
        return self.options.numerics is Numerics.EXACT

    @property
    def on_cuda(self) -> bool:
        return self.loaded.model.device.type == "cuda"

    @property
    def cache_bytes(self) -> int:
        """How much memory the KV cache may take."""
        return self.options.cache_mib << 20 or free_bytes(self.loaded.description.device) // 2

    @property
    def context_length(self) -> int:
        """Most tokens of one session."""
        whole = self.loaded.description.context_length
        return min(self.options.max_context or whole, whole)

    def tokens_in_cache(self, bytes_per_token: int) -> int:
        """Return how many tokens the KV cache holds, if each has keys and values of this size.

        Raises:
            InvalidInputError: none.
        """
        found = self.cache_bytes // (bytes_per_token + self.options.index_bytes)
        if found < 1:
            raise InvalidInputError(
                "no memory is left for the KV cache: raise the memory limit of the service, or "
                "set --cache-mib"
            )
        return found

    @functools.cached_property
    def rope_switch(self) -> int | None:
        """Length beyond which a text has other rotary factors; None: there is none."""
        return rope_switch(self.loaded.model, self.context_length)

    @functools.cached_property
    def check(self) -> RunnerCheck:
        """The comparison of each runner with the model alone."""
        return RunnerCheck(self.loaded, self.rope_switch, self.context_length)

    @functools.cached_property
    def unbatched(self) -> UnbatchedRunner:
        """The runner that any model can use."""
        return _rollback_capable(self)

    def switching(self, runner: ModelRunner[Any]) -> ModelRunner[Any]:
        """Return a runner that also changes the rotary factors, if the model needs it."""
        if self.rope_switch is None:
            return runner
        return RopeSwitchingRunner(runner, self.rope_switch, self.sampler)

    @functools.cached_property
    def max_tokens(self) -> int:
        """Tokens that fit in the memory for keys and values."""
        return self.tokens_in_cache(bytes_per_token(self.unbatched))

    def selection(self, runner: ModelRunner[Any], reason: str, **limits: Any) -> RunnerSelection:
        """Return a selection with the usual limits, where ``limits`` has no others."""
        usual = RunnerSelection(
            runner=runner,
            reason=reason,
            max_batch=self.options.max_batch,
            reuse_prefixes=self.options.reuse_prefixes,
            max_tokens=self.max_tokens,
            context_length=self.context_length,
            weight_format=self.loaded.description.dtype,
            weight_bytes=weight_bytes(self.loaded.model),
            checked=str(self.check),
        )
        return replace(usual, **limits)


def _candidates(case: _Case) -> list[str]:
    """Return the names of the candidates, the fastest first."""
    if case.options.weights is WeightFormat.INT8:
        return ["native"]
    on_cpu = case.loaded.model.device.type == "cpu"
    fastest = ["padded"] if case.on_cuda else ["native"] if on_cpu else []
    if case.is_exact:
        return fastest if case.on_cuda else [*fastest, "ragged"]
    return [*fastest, "ragged", "unbatched"]


def _report(case: _Case, selection: RunnerSelection, level: int) -> None:
    log.log(
        level,
        "%s: %s runner: %s; %.0f MB of weights as %s; %s",
        case.loaded.description.name,
        selection.runner.name,
        selection.reason,
        selection.weight_bytes / 1e6,
        selection.weight_format,
        selection.checked,
    )


def _advice(case: _Case, reasons: str) -> str:
    """Return what to do if no candidate can run the model."""
    found = case.loaded.description
    if case.options.weights is WeightFormat.INT8:
        return (
            f"8-bit weights (--weights int8) need the native runner, which cannot run "
            f"{found.name}: {reasons}; use --weights compact"
        )
    return (
        f"numerics exact cannot be promised for {found.name} in {found.dtype} on "
        f"{found.device}: {reasons}; use numerics fast, or another dtype or device"
    )


def _native(case: _Case) -> RunnerSelection:
    """Build the native runner, which is exact in any case."""
    runner = load_native_runner(
        case.loaded, case.options.weights, case.sampler, case.context_length, case.tokens_in_cache
    )
    is_lossy = case.options.weights is WeightFormat.INT8
    check = case.check.shortened(runner.context_length)
    if not is_lossy:
        check.refuse_if_wrong(runner)
    return RunnerSelection(
        runner=runner,
        reason=f"{runner.family} family, float32 on CPU",
        max_batch=case.options.max_batch,
        reuse_prefixes=case.options.reuse_prefixes,
        max_tokens=case.tokens_in_cache(runner.bytes_per_token),
        context_length=runner.context_length,
        checked="not checked, int8 is lossy" if is_lossy else str(check),
        weight_format=runner.weight_format,
        weight_bytes=runner.weight_bytes,
    )


def _padded(case: _Case) -> RunnerSelection:
    """Build the padded runner, all shapes captured as CUDA graphs."""
    if case.rope_switch is not None:
        raise RunnerRefusedError(f"its rotary factors change beyond {case.rope_switch} tokens")
    _refuse_by_configuration(case)
    num_rows = max(2, case.options.max_batch)
    context = case.context_length
    whole = -(-context // _LENGTH_UNIT) * _LENGTH_UNIT
    with misfits_refused():
        length = min(whole, case.max_tokens // num_rows // _LENGTH_UNIT * _LENGTH_UNIT)
        if length == 0:
            raise InvalidInputError(
                f"the memory for keys and values has no room for {num_rows} sessions: raise "
                "--cache-mib, or lower --max-batch"
            )
        buckets = (Buckets.exact if case.is_exact else Buckets.fast)(num_rows, length)
        capture = CudaGraphs(case.loaded.model.device) if case.on_cuda else direct
        runner = PaddedRunner(case.loaded.model, buckets, case.sampler, capture)
        num_shapes = runner.warm_up()
        check = case.check.shortened(length)
        check.refuse_if_wrong(runner)
        _refuse_inexact(case, runner, EXACT_QUERY_LENGTH, min(_MAX_CHECKED_ROWS, num_rows))
    return case.selection(
        runner,
        f"CUDA graphs of {num_shapes} shapes",
        max_tokens=num_rows * length,
        context_length=min(context, length),
        unit=length,
        checked=str(check),
    )


def _ragged(case: _Case) -> RunnerSelection:
    """Build the ragged runner."""
    if case.options.max_batch == 1 and not case.is_exact:
        raise RunnerRefusedError("max_batch is 1")
    _refuse_by_configuration(case)
    pass_tokens = exact_pass_tokens(case.loaded.model.dtype) if case.is_exact else 0
    with misfits_refused():
        runner = case.switching(RaggedRunner(case.loaded.model, case.sampler, pass_tokens))
        case.check.refuse_if_wrong(runner)
        _refuse_inexact(case, runner, pass_tokens, num_buffers=2)
    return case.selection(runner, f"the fastest runner on {case.loaded.description.device}")


def _unbatched(case: _Case) -> RunnerSelection:
    """Build the unbatched runner, which runs every model that can be served."""
    reuses = case.options.reuse_prefixes and not case.unbatched.copying_cache
    runner = case.switching(case.unbatched)
    return case.selection(runner, "", max_batch=1, reuse_prefixes=reuses)


def _refuse_by_configuration(case: _Case) -> None:
    """Raise RunnerRefusedError if the model is known not to work in batches as asked."""
    reason = (
        "the model only works with the cache of Transformers"
        if case.unbatched.copying_cache
        else reason_against_batching(case.loaded.model, case.context_length)
    )
    if reason is None and case.is_exact:
        reason = reason_against_exact(case.loaded.model)
        if case.rope_switch is not None:
            reason = f"texts are computed again beyond {case.rope_switch} tokens (longrope)"
    if reason is not None:
        raise RunnerRefusedError(reason)


def _refuse_inexact(
    case: _Case, runner: ModelRunner[Any], num_places: int, num_buffers: int
) -> None:
    """Raise RunnerRefusedError if numerics are exact and bits depend on the batch."""
    output_size = case.loaded.description.output_size
    if case.is_exact and not same_to_the_bit(runner, output_size, num_places, num_buffers):
        raise RunnerRefusedError("a token's bits depend on its place in a batch or on the others")


def _rollback_capable(case: _Case) -> UnbatchedRunner:
    """Return an unbatched runner whose cache can be rolled back.

    Raises:
        InvalidInputError: there is none for this model.
    """
    loaded = case.loaded
    reasons = [reason] if (reason := reason_against_serving(loaded.model)) else []
    for copying_cache in () if reasons else (False, True):
        if copying_cache and uses_sliding_window(loaded.model, case.context_length):
            break  # that cache drops what is outside the window, so it cannot be rolled back
        try:
            runner = UnbatchedRunner(loaded.model, case.sampler, copying_cache)
            case.check.refuse_if_wrong(case.switching(runner), not copying_cache)
        except RunnerRefusedError as refusal:
            reasons.append(str(refusal))
        else:
            return runner
    cause = " (an encoder? is_decoder is false)" if says_encoder(loaded.model) else ""
    raise InvalidInputError(
        f"{loaded.description.name} cannot be served because {reasons[0]}{cause}; choose a "
        "causal language model with attention over all tokens"
    )


_BUILDERS: dict[str, Callable[[_Case], RunnerSelection]] = {
    "native": _native,
    "padded": _padded,
    "ragged": _ragged,
    "unbatched": _unbatched,
}
