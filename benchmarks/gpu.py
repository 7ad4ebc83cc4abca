"""The rows that need a GPU: weights made up on it, against what its memory's speed allows.

None of them has been run on a GPU yet; on CPU the same code runs with tiny shapes, in the tests.
"""

from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from amusd.core.model import ModelDescription
from amusd.core.vocabulary import Vocabulary
from amusd.engine.interface import EngineOptions, Feed, Numerics
from amusd.engine.model_source import LoadedModel
from amusd.engine.slot_engine import SlotEngine, serve
from benchmarks.engine_tables import TableOfFigures
from benchmarks.engines import known
from benchmarks.rounds import Times, time_in_turns

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
_COPIED_BYTES = 1 << 30


def made_up(config: LlamaConfig, device: str) -> LoadedModel:
    """Return a model of random weights, made on the device in bfloat16."""
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
        name="made-up",
        device=device,
        dtype="bfloat16",
        num_parameters=sum(weight.numel() for weight in model.parameters()),
        context_length=int(config.max_position_embeddings),
        output_size=int(config.vocab_size),
        vocabulary=Vocabulary(0),
    )
    return LoadedModel(model, description)


def bytes_per_second(device: str, rounds: int, num_bytes: int = _COPIED_BYTES) -> float:
    """Return the speed of the device's memory: a copy, read and write counted."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    [found] = time_in_turns({"copy": lambda: target.copy_(source)}, rounds).values()
    return 2 * num_bytes / found.median


def large(
    device: str, rounds: int, config: LlamaConfig = LLAMA_8B, batch: int = 32, context: int = 2048
) -> TableOfFigures:
    """Passes of the verify model's shape: against the floor, over 8 tokens, in a full batch."""
    loaded = made_up(config, device)
    engine = serve(loaded, EngineOptions(max_batch=batch, reuse_prefixes=False))
    table = TableOfFigures("A verify model on this device", ("", "ms", "ratio", "of"))
    floor = engine.weight_bytes / bytes_per_second(device, rounds)
    runs = {"1 token": _pass(engine, 1, 1, 128), "8 tokens": _pass(engine, 8, 1, 128)}
    times = time_in_turns(runs, rounds)
    _add(table, "1 token", times["1 token"], floor, "weights / memory speed")
    _add(table, "8 tokens", times["8 tokens"], times["1 token"].median, "1 token")
    [full] = time_in_turns({"full": _pass(engine, 1, batch, context)}, rounds).values()
    gain = batch * times["1 token"].median / full.median
    table.rows.append(
        (
            f"{batch} sessions, {context} tokens each",
            f"{1e3 * full.median:.2f}",
            f"{gain:.1f}x",
            "tokens/s of 1 session",
        )
    )
    table.figures["batch"] = full.report() | {"gain": gain}
    return table


def small(device: str, rounds: int, config: LlamaConfig = LLAMA_1B) -> TableOfFigures:
    """A step of the draft model's shape against its floor."""
    engine = serve(made_up(config, device), EngineOptions(max_batch=1, reuse_prefixes=False))
    floor = engine.weight_bytes / bytes_per_second(device, rounds)
    [found] = time_in_turns({"step": _pass(engine, 1, 1, 128)}, rounds).values()
    table = TableOfFigures("A draft model on this device", ("", "ms", "ratio", "of"))
    _add(table, "draft step", found, floor, "weights / memory speed")
    return table


def exact(device: str, rounds: int, config: LlamaConfig = LLAMA_8B) -> TableOfFigures:
    """A pass over 8 tokens with numerics exact against fast."""
    loaded = made_up(config, device)
    times = {}
    for one in Numerics:  # one after the other, for two of them may not fit
        engine = serve(loaded, EngineOptions(max_batch=8, reuse_prefixes=False, numerics=one))
        [times[one]] = time_in_turns({"pass": _pass(engine, 8, 1, 128)}, rounds).values()
        del engine
    table = TableOfFigures("Numerics on this device, 8 tokens", ("", "ms", "ratio", "of"))
    _add(table, "exact", times[Numerics.EXACT], times[Numerics.FAST].median, "fast")
    return table


def _add(table: TableOfFigures, name: str, times: Times, against: float, what: str) -> None:
    share = times.median / against
    table.rows.append((name, f"{1e3 * times.median:.2f}", f"{share:.2f}", what))
    table.figures[name] = times.report() | {"ratio": share}


def _pass(
    engine: SlotEngine, num_tokens: int, num_sessions: int, context: int
) -> Callable[[], object]:
    """Return a pass over so many tokens of each session behind ``context`` others."""
    slots = [engine.open(context + num_tokens) for _ in range(num_sessions)]
    for slot in slots:
        engine.run([Feed(slot, known(engine, 10 + slot, context), 1)])
    feeds = [Feed(slot, known(engine, 20, num_tokens), num_tokens) for slot in slots]

    def run() -> None:
        engine.run(feeds)
        for slot in slots:
            engine.truncate(slot, context)

    return run
