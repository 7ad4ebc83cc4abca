"""The native runner: the results of Transformers, exact bits, lossless formats, refusals."""

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from amusd.engine.interface import EngineOptions, ScheduledSequence, WeightFormat
from amusd.engine.loading.model_source import LoadedModel
from amusd.engine.model_engine import ModelEngine, serve
from amusd.engine.native import native_model
from amusd.engine.native.library import BLOCK, unavailable_reason
from amusd.engine.native.native_loading import load_native_runner
from amusd.engine.native.native_model import NativeModel
from amusd.engine.native.native_runner import NativeRunner
from amusd.engine.reference import decode_autoregressive
from amusd.engine.runners.runner import Chunk, RunnerRefusedError
from amusd.engine.runners.selection import RunnerSelection
from amusd.engine.sampling.sampler import GREEDY, Sampler
from amusd.fleet.model_description import ModelDescription
from amusd.fleet.vocabulary import Vocabulary
from amusd.protocol.errors import InvalidInputError
from tests import tiny

pytestmark = pytest.mark.skipif(
    unavailable_reason() is not None, reason=f"no native engine: {unavailable_reason()}"
)

FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]
CONTEXT = 400
DESCRIPTION = ModelDescription("tiny", "cpu", "float32", 0, CONTEXT, tiny.VOCABULARY, Vocabulary(0))


def engine_of(
    model: PreTrainedModel, weights: WeightFormat = WeightFormat.COMPACT, num_threads: int = 1
) -> ModelEngine:
    return engine_with(NativeModel(model, weights), num_threads)


def engine_with(model: NativeModel, num_threads: int = 1, sampler: Sampler = GREEDY) -> ModelEngine:
    runner = NativeRunner(model, sampler, CONTEXT, num_threads)
    selection = RunnerSelection(
        runner=runner,
        reason="",
        max_batch=16,
        reuse_prefixes=True,
        max_tokens=10_000,
        context_length=CONTEXT,
        weight_format=runner.weight_format,
        weight_bytes=runner.weight_bytes,
    )
    return ModelEngine(DESCRIPTION, selection)


def logits_of(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def tokens_of(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(tiny.VOCABULARY) for _ in range(count)]


def rounded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model with weights that a smaller format holds without loss."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(dtype).float())
    return model


def quantised(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with matrices like those dequantised from Q4_1 and Q8_0 of GGUF."""
    with torch.no_grad():
        for index, weight in enumerate(p for p in model.parameters() if p.dim() == 2):
            blocks = weight.view(-1, BLOCK)
            low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
            if index % 2:
                scale, offset, most = ((high - low) / 15).half().float(), low.half().float(), 15
            else:
                scale = (blocks.abs().amax(1, keepdim=True) / 127).half().float()
                offset, most = -128 * scale, 255
            codes = ((blocks - offset) / scale).round().clamp(0, most)
            blocks.copy_((codes.double() * scale.double() + offset.double()).float())
    return model


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_its_results_are_those_of_transformers(family: str, num_threads: int) -> None:
    model = tiny.build(family)
    engine = engine_of(model, num_threads=num_threads)
    tokens = tokens_of(random.Random(0), 90)
    slot = engine.open(100)
    found = engine.logits([ScheduledSequence(slot, tokens, 90)])
    expected = logits_of(model, tokens)
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    ids = torch.tensor([tokens[:7]])
    written: Any = model.generate(ids, max_new_tokens=60, do_sample=False)  # type: ignore[operator]
    assert decode_autoregressive(engine, tokens[:7], 60) == written[0, 7:].tolist()


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_has_the_same_bits_in_any_batch(family: str, num_threads: int) -> None:
    model = quantised(tiny.build(family))
    rng = random.Random(2)
    texts = [tokens_of(rng, rng.randint(40, 90)) for _ in range(5)]
    single = engine_of(model)
    expected = []
    for text in texts:
        slot = single.open(100)
        expected.append(
            torch.cat([single.logits([ScheduledSequence(slot, [token], 1)]) for token in text])
        )
    batched = engine_of(model, num_threads=num_threads)
    slots = [batched.open(100) for _ in texts]
    while any(batched.length(slot) < len(text) for slot, text in zip(slots, texts, strict=True)):
        batch, places = [], []
        for index, (slot, text) in enumerate(zip(slots, texts, strict=True)):
            held = batched.length(slot)
            if rng.random() < 0.3:
                held = max(0, held - rng.randint(0, 4))
                batched.truncate(slot, held)
            chunk = text[held : held + rng.choice([1, 2, 5, 9, 30])]
            if chunk:
                batch.append(ScheduledSequence(slot, chunk, len(chunk)))
                places += [(index, position) for position in range(held, held + len(chunk))]
        for row, (index, position) in zip(batched.logits(batch), places, strict=True):
            assert torch.equal(row, expected[index][position])


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")]
)
def test_a_smaller_lossless_format_is_used(dtype: torch.dtype, name: str) -> None:
    model = rounded(tiny.build("qwen2"), dtype)
    compact, plain = engine_of(model), engine_of(model, WeightFormat.PLAIN)
    assert compact.weight_format == f"{name} without loss"
    assert plain.weight_format == "float32"
    assert compact.weight_bytes * 2 == plain.weight_bytes
    assert_same_bits(compact, plain)


def test_weights_dequantised_from_gguf_are_stored_in_8_bits() -> None:
    model = quantised(tiny.build("llama"))
    compact, plain = engine_of(model), engine_of(model, WeightFormat.PLAIN)
    assert compact.weight_format == "int8 without loss"
    assert compact.weight_bytes < 0.3 * plain.weight_bytes
    assert_same_bits(compact, plain)


def test_weights_stay_float32_if_no_smaller_format_is_lossless() -> None:
    assert engine_of(tiny.build("llama")).weight_format == "float32"


def assert_same_bits(first: ModelEngine, second: ModelEngine) -> None:
    tokens = tokens_of(random.Random(4), 60)
    slots = [engine.open(80) for engine in (first, second)]
    for chunk in (tokens[:1], tokens[1:4], tokens[4:13], tokens[13:]):
        found, expected = (
            engine.logits([ScheduledSequence(slot, chunk, len(chunk))])
            for engine, slot in zip((first, second), slots, strict=True)
        )
        assert torch.equal(found, expected)


def test_int8_is_close_but_not_equal() -> None:
    model = tiny.build("llama")
    engine = engine_of(model, WeightFormat.INT8)
    assert engine.weight_format == "int8"
    tokens = tokens_of(random.Random(5), 30)
    found = engine.logits([ScheduledSequence(engine.open(40), tokens, 30)])
    expected = logits_of(model, tokens)
    assert not torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    assert torch.allclose(found, expected, atol=0.1 * float(expected.abs().max()))


def test_a_prefix_of_another_sequence_is_copied() -> None:
    model = tiny.build("llama")
    engine, fresh = engine_of(model), engine_of(model)
    tokens = tokens_of(random.Random(6), 75)
    first = engine.open(100)
    engine.run([ScheduledSequence(first, tokens[:70], 0, is_prompt=True)])
    engine.close(first)
    second = engine.open(100)
    assert engine.reuse(second, [*tokens[:50], 1, 2]) == 50
    assert engine.usage.num_cached == 50
    rest = [1, 2, 3]
    found = engine.logits([ScheduledSequence(second, rest, 3)])
    expected = fresh.logits([ScheduledSequence(fresh.open(100), tokens[:50] + rest, 3)])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("token", [-1, tiny.VOCABULARY])
def test_a_token_outside_the_vocabulary_is_refused_before_anything_runs(token: int) -> None:
    engine = engine_of(tiny.build("llama"))
    slot = engine.open(30)
    with pytest.raises(InvalidInputError, match="outside the model's vocabulary"):
        engine.run([ScheduledSequence(slot, [1, token], 1)])
    engine.truncate(slot, 0)
    assert engine.run([ScheduledSequence(slot, [1, 2], 1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embeddings_of_any_format_are_widened_without_loss(dtype: torch.dtype) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        weight = model.get_parameter("model.embed_tokens.weight")
        weight.copy_(weight.to(dtype).float())
    native = NativeModel(model, WeightFormat.COMPACT)
    assert native._embedding.dtype is dtype
    tokens = tokens_of(random.Random(8), 20)
    engine = engine_with(native)
    found = engine.logits([ScheduledSequence(engine.open(20), tokens, 20)])
    expected = logits_of(model, tokens)
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_reduced_head_and_a_limit_on_its_rows(num_threads: int) -> None:
    model = tiny.build("llama")
    tokens = tokens_of(random.Random(7), 20)
    expected = logits_of(model, tokens)
    engine = engine_with(NativeModel(model, WeightFormat.COMPACT, num_outputs=100), num_threads)
    [found] = engine.run([ScheduledSequence(engine.open(30), tokens, 20)])
    assert found == expected[:, :100].argmax(1).tolist()
    head_ids = torch.arange(1000, 1256)
    engine = engine_with(NativeModel(model, WeightFormat.COMPACT), num_threads, Sampler(head_ids))
    [found] = engine.run([ScheduledSequence(engine.open(30), tokens, 20)])
    assert found == [1000 + token for token in expected.argmax(1).tolist()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_supported_model_is_native_and_the_reason_names_its_family(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "amusd.engine.runners.selection")
    engine = serve(LoadedModel(tiny.build(family), DESCRIPTION))
    found = engine.description
    reason = f"{family.capitalize()} family, float32 on CPU"
    assert (found.runner, found.runner_reason) == ("native", reason)
    [record] = caplog.records
    assert record.levelno == logging.INFO
    weights = f"{engine.weight_bytes / 1e6:.0f} MB of weights as float32"
    checked = "logits differ from those of the model alone by "
    assert record.getMessage().startswith(f"tiny: native runner: {reason}; {weights}; {checked}")


def test_int8_weights_need_the_native_runner() -> None:
    loaded = LoadedModel(tiny.build("gpt2"), DESCRIPTION)
    with pytest.raises(
        InvalidInputError, match=r"need the native runner, .* GPT2.*; use --weights"
    ):
        serve(loaded, EngineOptions(weights=WeightFormat.INT8))


WINDOWED = MistralConfig(**tiny.COMMON, **tiny.NO_SPECIAL, sliding_window=8)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: tiny.build("gpt2"), "families Llama, .*, not GPT2LMHeadModel"),
        (lambda: MistralForCausalLM(WINDOWED), "it does not support sliding windows"),
        (lambda: tiny.build("llama").bfloat16(), "float32 on CPU, not bfloat16 on cpu"),
    ],
)
def test_a_model_outside_its_scope_is_refused_with_a_reason(
    make: Callable[[], PreTrainedModel], reason: str
) -> None:
    loaded = LoadedModel(make(), DESCRIPTION)
    for weights in (WeightFormat.COMPACT, WeightFormat.INT8):
        with pytest.raises(RunnerRefusedError, match=reason):
            load_native_runner(loaded, weights, GREEDY)


def test_a_model_with_other_results_is_refused() -> None:
    model = tiny.build("llama")
    assert serve(LoadedModel(model, DESCRIPTION)).description.runner == "native"
    model.register_forward_hook(_twice_as_large)
    found = serve(LoadedModel(model, DESCRIPTION)).description
    assert found.runner == "ragged"
    assert "native runner refused: its logits differ from those of the model" in found.runner_reason


def _twice_as_large(module: Any, inputs: Any, output: Any) -> Any:
    output.logits = 2 * output.logits
    return output


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (EngineOptions(cache_mib=1024), 1 << 20),
        (EngineOptions(cache_mib=64, max_context=128), 128),
        (EngineOptions(cache_mib=1), (1 << 20) // 512),
        (EngineOptions(cache_mib=1, index_bytes=512), (1 << 20) // 1024),
    ],
)
def test_tables_cover_what_is_served_and_not_the_whole_context_of_the_model(
    options: EngineOptions, expected: int
) -> None:
    config = LlamaConfig(
        **tiny.SIZES | {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4},
        **tiny.NO_SPECIAL,
        max_position_embeddings=1 << 20,
    )
    description = replace(DESCRIPTION, context_length=1 << 20)
    engine = serve(LoadedModel(LlamaForCausalLM(config), description), options)
    assert isinstance(engine._runner, NativeRunner)
    model = engine._runner._model
    assert (len(model._cos), len(model._sin)) == (expected, expected)
    with pytest.raises(InvalidInputError, match="do not fit the context"):
        engine.open(expected + 1)


def test_tables_that_are_computed_in_blocks_are_those_of_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native_model, "_TABLE_BLOCK", 7)
    model = tiny.build("llama")
    body: Any = model.base_model
    cos, sin = body.rotary_emb(torch.empty(1), torch.arange(50)[None])
    tables = native_model._rotations(body, 50)
    assert torch.allclose(tables[0], cos[0, :, : cos.shape[-1] // 2], atol=1e-6)
    assert torch.allclose(tables[1], sin[0, :, : sin.shape[-1] // 2], atol=1e-6)


def test_threads_without_a_core_of_their_own_sleep_while_they_wait() -> None:
    """Eight threads on one core need the time of their work, not that of polling."""
    model = NativeModel(tiny.build("llama"), WeightFormat.COMPACT)
    num_passes, seconds = 20, []

    def run() -> None:
        os.sched_setaffinity(threading.get_native_id(), {min(os.sched_getaffinity(0))})
        runner = NativeRunner(model, GREEDY, CONTEXT, num_threads=8)
        buffer = runner.allocate(CONTEXT)
        started = time.process_time()
        for position in range(num_passes):
            runner.tokens([Chunk(buffer, position, [5], 1)])
        seconds.append((time.process_time() - started) / num_passes)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seconds[0] < 0.01
