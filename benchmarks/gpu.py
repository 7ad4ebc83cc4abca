"""Tables that need a GPU: random weights of real shapes, compared with the memory bandwidth.

The tests run the same code on CPU with tiny shapes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from amusd.engine.interface import EngineOptions, Numerics, ScheduledSequence
from amusd.engine.loading.model_source import LoadedModel
from amusd.engine.model_engine import ModelEngine, serve
from amusd.fleet.model_description import ModelDescription
from amusd.fleet.vocabulary import Vocabulary
from benchmarks.engine_tables import TableOfFigures, ms
from benchmarks.engines import known
from benchmarks.rounds import Times, ratio, time_interleaved

LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
)
LLAMA_1B = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
_COPIED_BYTES = {True: 1 << 30, False: 1 << 26}  # on a GPU; on CPU, in tests


def random_model(config: LlamaConfig, device: str) -> LoadedModel:
    """Return a model with random bfloat16 weights, created on the device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    torch.nn.Module.eval(model)
    description = ModelDescription(
        name="random",
        device=device,
        dtype="bfloat16",
        num_parameters=sum(weight.numel() for weight in model.parameters()),
        context_length=int(config.max_position_embeddings),
        output_size=int(config.vocab_size),
        vocabulary=Vocabulary(0),
    )
    return LoadedModel(model, description)


@dataclass(frozen=True, slots=True)
class MemoryCopy:
    """A copy within the device's memory; its bandwidth gives the floor of a pass."""

    device: str

    def start(self) -> Callable[[], object]:
        """Allocate the buffers and return the copy."""
        source = torch.empty(_COPIED_BYTES[self.on_cuda], dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    @property
    def on_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    def floor(self, copies: Times, num_bytes: int) -> Times:
        """Return the time to read ``num_bytes``; a copy reads and writes each byte."""
        return copies.scaled(num_bytes / (2 * _COPIED_BYTES[self.on_cuda]))


def large(
    device: str, rounds: int, config: LlamaConfig = LLAMA_8B, batch: int = 32, context: int = 2048
) -> TableOfFigures:
    """Measure a verify model's shape: one token against the floor, 8 tokens, a full batch."""
    loaded, copy = random_model(config, device), MemoryCopy(device)
    engine = serve(loaded, EngineOptions(max_batch=batch, reuse_prefixes=False))
    runs = {
        "copy": copy.start(),
        "1 token": _pass(engine, 1, 1, 128),
        "8 tokens": _pass(engine, 8, 1, 128),
        "batch": _pass(engine, 1, batch, context),
    }
    times = time_interleaved(runs, rounds)
    table = _table("A verify model on this device")
    single = times["1 token"]
    floor = copy.floor(times["copy"], engine.weight_bytes)
    _add(table, "1 token", single, floor, "weights / memory speed")
    _add(table, "8 tokens", times["8 tokens"], single, "1 token")
    full = times["batch"]
    gain = ratio(single, full.scaled(1 / batch))
    name = f"{batch} sessions, {context} tokens each"
    table.rows.append((name, ms(full), f"{gain[0]:.1f}x", "tokens/s of 1 session"))
    table.figures["batch"] = full.report() | {
        "tokens_per_second": batch / full.median,
        "gain": gain,
    }
    return table


def small(device: str, rounds: int, config: LlamaConfig = LLAMA_1B) -> TableOfFigures:
    """Compare a step of a draft model's shape with its floor."""
    engine = serve(random_model(config, device), EngineOptions(max_batch=1, reuse_prefixes=False))
    copy = MemoryCopy(device)
    times = time_interleaved({"copy": copy.start(), "step": _pass(engine, 1, 1, 128)}, rounds)
    table = _table("A draft model on this device")
    floor = copy.floor(times["copy"], engine.weight_bytes)
    _add(table, "draft step", times["step"], floor, "weights / memory speed")
    return table


def exact(device: str, rounds: int, config: LlamaConfig = LLAMA_8B) -> TableOfFigures:
    """Compare a pass over 8 tokens with numerics exact and fast."""
    loaded = random_model(config, device)
    times = {}
    for one in Numerics:  # sequentially, because two engines may not fit into memory
        engine = serve(loaded, EngineOptions(max_batch=8, reuse_prefixes=False, numerics=one))
        [times[one]] = time_interleaved({"pass": _pass(engine, 8, 1, 128)}, rounds).values()
        del engine
    table = _table("Numerics on this device, 8 tokens")
    _add(table, "exact", times[Numerics.EXACT], times[Numerics.FAST], "fast")
    return table


def _table(title: str) -> TableOfFigures:
    return TableOfFigures(title, ("", "ms", "ratio", "of"))


def _add(table: TableOfFigures, name: str, times: Times, against: Times, what: str) -> None:
    times_as_long = ratio(times, against)
    table.rows.append((name, ms(times), f"{times_as_long[0]:.2f}", what))
    table.figures[name] = times.report() | {"ratio": times_as_long}


def _pass(
    engine: ModelEngine, num_tokens: int, num_sessions: int, context: int
) -> Callable[[], object]:
    """Return a repeatable pass over ``num_tokens`` of each session after ``context`` tokens."""
    slots = [engine.open(context + num_tokens) for _ in range(num_sessions)]
    for slot in slots:
        engine.run([ScheduledSequence(slot, known(engine, 10 + slot, context), 1)])
    scheduled = [
        ScheduledSequence(slot, known(engine, 20, num_tokens), num_tokens) for slot in slots
    ]

    def run() -> None:
        engine.run(scheduled)
        for slot in slots:
            engine.truncate(slot, context)

    return run
