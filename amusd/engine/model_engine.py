"""The engine of every real model: a KV cache manager and the model runner selected for it."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from amusd.engine.finite_prefix import Output, finite_outputs
from amusd.engine.interface import (
    DEFAULT_OPTIONS,
    NO_TOKEN,
    EngineOptions,
    Outcome,
    ScheduledSequence,
)
from amusd.engine.kv.cache_manager import KVCacheManager
from amusd.engine.loading.model_source import LoadedModel, ModelSource, load_source, reason_of
from amusd.engine.runners.runner import Chunk
from amusd.engine.runners.selection import RunnerSelection, select_runner
from amusd.engine.sampling.constraints import ConstraintCompiler
from amusd.engine.sampling.reference_sampler import NOT_FINITE, Sampled
from amusd.engine.sampling.sampler import Ranking
from amusd.engine.sampling.sequence_sampler import (
    ConstraintFactory,
    SequenceSampler,
    open_sampler,
)
from amusd.fleet.model_description import CacheUsage, ModelDescription
from amusd.protocol.errors import AmusdError, InvalidInputError
from amusd.sampling.parameters import GREEDY, SequenceSampling, TokenLogprobs

log = logging.getLogger(__name__)


class ModelEngine:
    """Runs batches of one model; see ``Engine`` for what each method promises."""

    def __init__(
        self,
        description: ModelDescription,
        selection: RunnerSelection,
        constraints: ConstraintFactory | None = None,
    ) -> None:
        """Run a model as selected; ``serve`` and ``load_engine`` select.

        Without ``constraints``, a sequence with a constraint is refused.
        """
        self.description = description
        self._constraints = constraints
        self._is_draft = selection.is_draft
        self._runner = selection.runner
        self.weight_format = selection.weight_format
        self.weight_bytes = selection.weight_bytes  # read by a forward pass
        self.max_batch = selection.max_batch
        self.num_alternatives = selection.num_alternatives
        self._samplers: dict[int, SequenceSampler] = {}  # of slots that need one
        self._rankings: dict[int, Ranking | Sampled] = {}  # of the last output of each slot
        self._logprobs: dict[int, list[TokenLogprobs]] = {}  # of the last batch of each slot
        self._cache: KVCacheManager[Any] = KVCacheManager(
            selection.max_tokens,
            selection.context_length,
            allocate=selection.runner.allocate,
            copy=selection.runner.copy if selection.reuse_prefixes else None,
            free=selection.runner.free,
            unit=selection.unit,
        )

    @property
    def num_open(self) -> int:
        """Number of open sequences."""
        return len(self._cache)

    @property
    def usage(self) -> CacheUsage:
        """How much memory for keys and values is in use."""
        return self._cache.usage

    def prepare(self, sampling: SequenceSampling) -> object:
        """Compile the constraint of a sequence, on any thread. A draft goes without a bad one."""
        constraint = sampling.parameters.constraint
        if constraint is None or self._constraints is None:
            return None
        try:
            return self._constraints.prepare(constraint)
        except AmusdError:
            if self._is_draft:
                return None
            raise

    def open(self, capacity: int, sampling: SequenceSampling = GREEDY) -> int:
        """Return the slot of a new empty sequence for at most ``capacity`` tokens."""
        size = self.description.output_size
        sampler = open_sampler(sampling, size, self._constraints, self._is_draft)
        slot = self._cache.open(capacity)
        if sampler is not None:
            self._samplers[slot] = sampler
        return slot

    def length(self, slot: int) -> int:
        """Return how many tokens of the sequence are in the KV cache."""
        return self._cache.length(slot)

    def reuse(self, slot: int, tokens: Sequence[int]) -> int:
        """Reuse the longest cached prefix of ``tokens``, leaving at least one token to compute."""
        held, gained = self._cache.length(slot), self._cache.reuse(slot, tokens)
        if gained and slot in self._samplers:
            self._samplers[slot].extend(tokens[held : held + gained])
        return gained

    def run(self, batch: Sequence[ScheduledSequence]) -> list[Any]:
        """Run one batch; return the ``Outcome`` of each sequence: lists if none is sampled."""
        for scheduled in batch:
            self._logprobs.pop(scheduled.slot, None)
        chunks = self._chunks(batch)
        if any(chunk.rows for chunk in chunks):
            return self._sampled(batch, chunks)
        if self.num_alternatives:
            tokens = self._ranked(batch, chunks)
        else:
            tokens = self._runner.tokens(chunks)
        found = _divided(tokens, batch)
        if NO_TOKEN in tokens:
            return [
                finite_outputs(self._runner.tokens, chunk, NO_TOKEN)
                if NO_TOKEN in outputs
                else outputs
                for chunk, outputs in zip(chunks, found, strict=True)
            ]
        return found

    def logits(self, batch: Sequence[ScheduledSequence]) -> Tensor:
        """Run one batch as ``run`` does; return the logits of all outputs, [outputs, head]."""
        return self._runner.logits(self._chunks(batch))

    def alternatives(self, slot: int) -> Sequence[int]:
        """Return the next-best tokens beside the last output of a sequence, the best first."""
        ranking = self._rankings.get(slot)
        return () if ranking is None else ranking.tokens[1:]

    def probabilities(self, slot: int) -> Sequence[float]:
        """Return the probabilities of the last output and of its alternatives, in order."""
        ranking = self._rankings.get(slot)
        return () if ranking is None else ranking.probabilities

    def logprobs(self, slot: int) -> Sequence[TokenLogprobs]:
        """Return the log-probabilities of a sequence's outputs in its last batch, in order."""
        return self._logprobs.get(slot, ())

    def truncate(self, slot: int, length: int) -> None:
        """Drop the sequence's tokens from position ``length`` on."""
        self._cache.truncate(slot, length)
        if slot in self._samplers:
            self._samplers[slot].truncate(length)

    def close(self, slot: int) -> None:
        """Close the sequence."""
        for by_slot in (self._rankings, self._logprobs, self._samplers):
            by_slot.pop(slot, None)
        self._cache.close(slot)

    def _sampled(
        self, batch: Sequence[ScheduledSequence], chunks: list[Chunk[Any]]
    ) -> list[Outcome]:
        """Run one batch in which some outputs are sampled by their rows."""
        outcomes: list[Outcome] = []
        found = _divided(self._runner.sample(chunks), batch)
        for scheduled, chunk, sampled in zip(batch, chunks, found, strict=True):
            if NOT_FINITE in sampled:
                sampled = finite_outputs(self._runner.sample, chunk, NOT_FINITE)  # noqa: PLW2901
            if sampled and self.num_alternatives:
                self._rankings[scheduled.slot] = sampled[-1]
            if logprobs := [one.logprobs for one in sampled if one.logprobs is not None]:
                self._logprobs[scheduled.slot] = logprobs
            tokens = [one.tokens[0] for one in sampled]
            sampler = self._samplers.get(scheduled.slot)
            outcomes.append(tokens if sampler is None else sampler.outcome(tokens))
        return outcomes

    def _ranked(self, batch: Sequence[ScheduledSequence], chunks: list[Chunk[Any]]) -> list[int]:
        """Run one batch; return the tokens of all outputs, and keep the last rankings."""
        rankings = self._runner.rankings(chunks)
        end = 0
        for scheduled in batch:
            end += scheduled.num_outputs
            if scheduled.num_outputs:
                self._rankings[scheduled.slot] = rankings[end - 1]
        return [ranking.tokens[0] for ranking in rankings]

    def _chunks(self, batch: Sequence[ScheduledSequence]) -> list[Chunk[Any]]:
        """Record the tokens of the batch; return them with the buffers of their sequences."""
        cache, chunks = self._cache, []
        for scheduled in batch:
            start = cache.length(scheduled.slot)
            cache.extend(scheduled.slot, scheduled.tokens, scheduled.is_prompt)
            sampler = self._samplers.get(scheduled.slot)
            rows = () if sampler is None else sampler.append(scheduled)
            buffer = cache[scheduled.slot]
            chunks.append(Chunk(buffer, start, scheduled.tokens, scheduled.num_outputs, rows))
        return chunks


def _divided(outputs: list[Output], batch: Sequence[ScheduledSequence]) -> list[list[Output]]:
    """Divide the outputs of a batch among its sequences."""
    found, end = [], 0
    for scheduled in batch:
        start, end = end, end + scheduled.num_outputs
        found.append(outputs[start:end])
    return found


def serve(
    loaded: LoadedModel,
    options: EngineOptions = DEFAULT_OPTIONS,
    constraints: ConstraintFactory | None = None,
) -> ModelEngine:
    """Return an engine for a loaded model, warmed up. It has ``constraints``, if any.

    Raises:
        InvalidInputError: the model cannot be rolled back, or not be run as the options ask.
    """
    selection = select_runner(loaded, options)
    description = replace(
        loaded.description,
        numerics=options.numerics.value,
        weight_format=selection.weight_format,
        runner=selection.runner.name,
        runner_reason=selection.reason,
    )
    return ModelEngine(description, selection, constraints)


def load_engine(
    source: ModelSource,
    known_tokens_only: bool = False,
    options: EngineOptions = DEFAULT_OPTIONS,
) -> ModelEngine:
    """Load a model and return an engine for it; see ``load_source`` and ``serve``.

    Raises:
        InvalidInputError: the model cannot be loaded, or not be served as the options ask.
    """
    loaded = load_source(source, known_tokens_only)
    for remark in loaded.remarks:
        log.warning("%s: %s", source.name, remark)
    model = loaded.description
    constraints = ConstraintCompiler(source.location, model.output_size, model.eos_token_ids)
    try:
        return serve(loaded, options, constraints)
    except AmusdError:
        raise
    except Exception as error:  # an odd configuration raises whatever it leads to
        log.debug("serving a model failed", exc_info=True)
        raise InvalidInputError(
            f"cannot serve model {source.name!r}: {reason_of(error)}; check its config.json"
        ) from error
