"""What the benchmarks time: engines as the services run them, and Transformers' own model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from amusd.cli.local_services import LocalSettings, place
from amusd.engine.interface import EngineOptions, Numerics, ScheduledSequence, WeightFormat
from amusd.engine.loading.device import DeviceSettings, bind_engine_thread, prepare_torch
from amusd.engine.loading.model_loading import locate_model
from amusd.engine.loading.model_source import LoadedModel, ModelSource, load_source
from amusd.engine.model_engine import ModelEngine, serve
from amusd.engine.reference import decode_autoregressive

CONTEXT = 128
"""Cached tokens before a timed pass."""


def verify_cores() -> tuple[int, ...]:
    """Return the cores of a verify service beside a draft; empty if there is only one core.

    Call it before this thread is bound to cores: it counts the cores that the thread may use.
    """
    _, where = place(LocalSettings(verify_device="cpu", draft_device="cpu"))
    return where.cpus


@dataclass(frozen=True, slots=True)
class Bench:
    """One model on cores of this machine, for Transformers and for engines."""

    name: str
    dtype: str = "auto"
    cpus: tuple[int, ...] = ()
    max_batch: int = 8

    def prepare(self) -> None:
        """Bind this thread to the cores, and let PyTorch use one thread per core."""
        device = DeviceSettings("cpu", self.dtype, len(self.cpus), self.cpus)
        bind_engine_thread(device)
        prepare_torch(device)

    def load(self) -> LoadedModel:
        """Load the model with Transformers."""
        location = locate_model(self.name, "verify")
        return load_source(ModelSource(self.name, location, dtype=self.dtype))

    def engine(
        self,
        weights: WeightFormat = WeightFormat.COMPACT,
        numerics: Numerics = Numerics.FAST,
    ) -> ModelEngine:
        """Return a new engine for the model."""
        options = EngineOptions(self.max_batch, 1024, False, numerics, weights)
        return serve(self.load(), options)


def engine_pass(
    engine: ModelEngine, num_tokens: int, num_sessions: int = 1
) -> Callable[[], object]:
    """Return a repeatable pass over ``num_tokens`` of each of ``num_sessions``."""
    slots = [open_slot(engine, number) for number in range(num_sessions)]
    batch = [ScheduledSequence(slot, known(engine, 20, num_tokens), num_tokens) for slot in slots]

    def run() -> None:
        engine.run(batch)
        for slot in slots:
            engine.truncate(slot, CONTEXT)

    return run


def open_slot(engine: ModelEngine, number: int = 0) -> int:
    """Return a slot that holds ``CONTEXT`` tokens."""
    slot = engine.open(CONTEXT + 64)
    engine.run([ScheduledSequence(slot, known(engine, 10 + number, CONTEXT), 1)])
    return slot


def known(engine: ModelEngine, first: int, count: int) -> list[int]:
    """Return ``count`` tokens of the model's vocabulary."""
    return [token % engine.description.output_size for token in range(first, first + count)]


def transformers_pass(model: PreTrainedModel, num_tokens: int) -> Callable[[], object]:
    """Return a repeatable pass of Transformers over ``num_tokens``; it crops its cache."""
    cache = DynamicCache(config=model.config)
    size = int(model.config.vocab_size)
    tokens = torch.arange(20, 20 + num_tokens)[None] % size

    @torch.inference_mode()
    def run() -> object:
        output: Any = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        found = output.logits[0].argmax(-1).tolist()
        cache.crop(-num_tokens)
        return found

    with torch.inference_mode():
        model(input_ids=torch.arange(10, 10 + CONTEXT)[None] % size, past_key_values=cache)
    return run


def engine_text(engine: ModelEngine, prompt: Sequence[int], count: int) -> Callable[[], list[int]]:
    """Return autoregressive decoding of ``count`` tokens by an engine."""
    return lambda: decode_autoregressive(engine, list(prompt), count)


def transformers_text(
    model: PreTrainedModel, prompt: Sequence[int], count: int
) -> Callable[[], list[int]]:
    """Return ``generate`` of Transformers for ``count`` tokens."""
    ids = torch.tensor([list(prompt)])

    @torch.inference_mode()
    def run() -> list[int]:
        output: Any = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
        )
        return [int(token) for token in output[0, len(prompt) :].tolist()]

    return run
