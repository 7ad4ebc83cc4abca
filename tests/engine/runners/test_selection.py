"""Which runner a model gets, what the log and the description say, and what is refused."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM
from transformers.cache_utils import DynamicCache

from amusd.engine.interface import EngineOptions, Numerics, ScheduledSequence
from amusd.engine.kv.sequence_cache import CopyingCache
from amusd.engine.loading.model_source import LoadedModel, ModelSource, load_source
from amusd.engine.model_engine import ModelEngine, load_engine, serve
from amusd.engine.reference import decode_autoregressive, decode_speculative
from amusd.engine.runners import selection as selection_module
from amusd.engine.runners.graph_capture import direct
from amusd.engine.runners.padded import PaddedRunner
from amusd.engine.runners.ragged import RaggedRunner
from amusd.engine.runners.transformers_hooks import refuse_variants
from amusd.engine.runners.unbatched import UnbatchedRunner
from amusd.protocol.errors import InvalidInputError
from tests import tiny

pytestmark = pytest.mark.usefixtures("without_native_runner")

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
EXACT = EngineOptions(numerics=Numerics.EXACT)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return tiny.save(tiny.build("llama"), tmp_path)


@pytest.fixture
def windowed(tmp_path: Path) -> str:
    torch.manual_seed(0)
    config = MistralConfig(**tiny.COMMON, **tiny.NO_SPECIAL, sliding_window=8)
    return tiny.save(MistralForCausalLM(config), tmp_path)


NOT_NATIVE = "native runner refused: this test disables it"


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, selection_module.log.name)


def assert_selected(
    engine: ModelEngine, caplog: pytest.LogCaptureFixture, runner: str, reason: str, level: int
) -> None:
    """Assert that the description has runner and reason, and that the log has them once."""
    found = engine.description
    assert (found.runner, found.runner_reason) == (runner, reason)
    records = [r for r in caplog.records if r.name == selection_module.log.name]
    assert [r.levelno for r in records] == [level]
    assert records[0].getMessage().startswith(f"{found.name}: {runner} runner: {reason}; ")


def greedy(loaded: LoadedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """The model's own answer, without any cache."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(num_tokens):
            logits = loaded.model(input_ids=torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_without_the_native_runner_a_model_is_ragged_and_the_log_warns(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = load_engine(ModelSource("tiny", folder))
    assert isinstance(engine._runner, RaggedRunner)
    assert engine.max_batch == 32
    assert_selected(engine, caplog, "ragged", NOT_NATIVE, logging.WARNING)


def test_batches_of_one_sequence_need_no_ragged_runner(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = load_engine(ModelSource("tiny", folder), options=EngineOptions(max_batch=1))
    reason = f"{NOT_NATIVE}; ragged runner refused: max_batch is 1"
    assert_selected(engine, caplog, "unbatched", reason, logging.WARNING)


def test_a_sliding_window_is_unbatched_and_the_reason_says_why(
    windowed: str, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_source(ModelSource("windowed", windowed))
    engine = serve(loaded)
    assert engine.max_batch == 1
    why = "some layers attend to a sliding window only"
    reason = f"{NOT_NATIVE}; ragged runner refused: {why}"
    assert_selected(engine, caplog, "unbatched", reason, logging.WARNING)
    expected = greedy(loaded, PROMPT, 20)
    assert decode_autoregressive(engine, PROMPT, 20) == expected
    draft = serve(LoadedModel(tiny.perturbed(loaded.model, 0.05), loaded.description))
    assert decode_speculative(draft, engine, PROMPT, 20, lookahead=4) == expected


def test_eager_attention_is_unbatched_and_the_reason_says_why(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_source(ModelSource("eager", folder))
    loaded.model.set_attn_implementation("eager")
    engine = serve(loaded)
    assert isinstance(engine._runner, UnbatchedRunner)
    reason = f"{NOT_NATIVE}; ragged runner refused: its attention is eager, not sdpa"
    assert_selected(engine, caplog, "unbatched", reason, logging.WARNING)
    assert decode_autoregressive(engine, PROMPT, 10) == greedy(loaded, PROMPT, 10)


Forward = Callable[..., Any]


def test_a_model_with_other_results_in_batches_is_unbatched(
    folder: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_source(ModelSource("odd", folder))
    forward: Forward = loaded.model.forward

    def odd(*args: Any, **kwargs: Any) -> Any:  # its logits depend on the batch
        output = forward(*args, **kwargs)
        if "ragged" in kwargs:
            output.logits = output.logits * len(kwargs["ragged"].sizes)
        return output

    monkeypatch.setattr(loaded.model, "forward", odd)
    engine = serve(loaded)
    assert engine.max_batch == 1
    why = (
        "its logits differ from those of the model alone by 1 of their size, and 0.0001 is allowed"
    )
    reason = f"{NOT_NATIVE}; ragged runner refused: {why}"
    assert_selected(engine, caplog, "unbatched", reason, logging.WARNING)


def test_a_model_that_takes_only_the_cache_of_transformers_is_served_with_it(
    folder: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_source(ModelSource("picky", folder))
    forward: Forward = loaded.model.forward

    def picky(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if cache is not None and not isinstance(cache, DynamicCache):
            raise TypeError("this model wants a DynamicCache")
        return forward(*args, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", picky)
    engine = serve(loaded, EngineOptions(cache_mib=8))
    assert isinstance(engine._cache[engine.open(10)], CopyingCache)
    why = "the model only works with the cache of Transformers"
    reason = f"{NOT_NATIVE}; ragged runner refused: {why}"
    assert_selected(engine, caplog, "unbatched", reason, logging.WARNING)
    expected = greedy(loaded, PROMPT, 20)
    assert decode_autoregressive(engine, PROMPT, 20) == expected
    draft = serve(LoadedModel(tiny.perturbed(tiny.build("llama"), 0.05), loaded.description))
    assert decode_speculative(draft, engine, PROMPT, 20, lookahead=4) == expected
    donor, slot = engine.open(60), engine.open(60)
    engine.run([ScheduledSequence(donor, list(range(40)), 1)])
    assert engine.reuse(slot, list(range(50))) == 0
    with pytest.raises(InvalidInputError, match="exact cannot be promised"):
        serve(loaded, EXACT)


def test_exact_is_refused_where_sequences_cannot_be_batched(windowed: str) -> None:
    with pytest.raises(
        InvalidInputError, match=r"attend to a sliding window only; use numerics fast"
    ):
        load_engine(ModelSource("windowed", windowed), options=EXACT)


def test_the_limit_counts_what_keys_and_values_really_take(folder: str) -> None:
    engine: ModelEngine = load_engine(
        ModelSource("tiny", folder, dtype="bfloat16"), options=EngineOptions(cache_mib=1)
    )
    bytes_per_token = 2 * 2 * 2 * 16 * 2  # layers, keys and values, heads, head size, bfloat16
    assert engine.usage.max_tokens == (1 << 20) // bytes_per_token


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Select as on CUDA, and run without graphs."""
    monkeypatch.setattr(selection_module._Case, "on_cuda", True)
    monkeypatch.setattr(selection_module, "CudaGraphs", lambda _: direct)


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("numerics", list(Numerics))
def test_cuda_gets_the_padded_runner(
    folder: str, numerics: Numerics, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_source(ModelSource("tiny", folder))
    options = EngineOptions(max_batch=2, cache_mib=8, numerics=numerics)
    engine = serve(loaded, options)
    assert isinstance(engine._runner, PaddedRunner)
    num_shapes = 1 if numerics is Numerics.EXACT else 28
    assert_selected(engine, caplog, "padded", f"CUDA graphs of {num_shapes} shapes", logging.INFO)
    assert engine.max_batch == 2
    assert engine.usage.max_tokens == 2 * 448  # the context in whole units, for each session
    assert decode_autoregressive(engine, PROMPT, 10) == greedy(loaded, PROMPT, 10)


@pytest.mark.usefixtures("as_on_cuda")
def test_cuda_without_graphs_gets_the_ragged_runner_and_the_reason_says_why(
    folder: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(_: torch.device) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(selection_module, "CudaGraphs", failing)
    engine = load_engine(ModelSource("tiny", folder), options=EngineOptions(cache_mib=16))
    assert isinstance(engine._runner, RaggedRunner)
    why = "RuntimeError: operation not permitted when stream is capturing"
    assert_selected(engine, caplog, "ragged", f"padded runner refused: {why}", logging.WARNING)


@pytest.mark.usefixtures("as_on_cuda")
def test_too_little_memory_for_all_sessions_is_refused(folder: str) -> None:
    options = EngineOptions(max_batch=200, cache_mib=1)
    with pytest.raises(InvalidInputError, match="no room for 200 sessions"):
        load_engine(ModelSource("tiny", folder), options=options)


def test_attention_of_another_kind_is_refused() -> None:
    refuse_variants({"sliding_window": None, "dropout": 0.0}, 10)
    refuse_variants({"sliding_window": 10}, 10)
    with pytest.raises(NotImplementedError, match="softcap"):
        refuse_variants({"softcap": 30.0}, 10)
    with pytest.raises(NotImplementedError, match="a sliding window of 9 tokens"):
        refuse_variants({"sliding_window": 9}, 10)


@pytest.mark.parametrize("cuda", [False, True])
def test_the_longest_session_that_is_served_bounds_what_an_engine_reserves(
    folder: str, cuda: bool, request: pytest.FixtureRequest
) -> None:
    if cuda:
        request.getfixturevalue("as_on_cuda")
    options = EngineOptions(max_batch=2, cache_mib=16, max_context=100)
    engine = load_engine(ModelSource("tiny", folder), options=options)
    assert engine.description.context_length == 400
    engine.open(100)
    with pytest.raises(InvalidInputError, match="101 tokens do not fit the context"):
        engine.open(101)
    if cuda:
        assert engine.usage.max_tokens == 2 * 128


def test_without_memory_for_a_single_token_a_model_is_refused(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection_module, "free_bytes", lambda device: 100)
    with pytest.raises(InvalidInputError, match="no memory is left for the KV cache"):
        load_engine(ModelSource("tiny", folder))


def test_the_size_of_the_cache_includes_what_the_service_keeps_of_each_token(folder: str) -> None:
    per_token = 2 * 4 * 2 * 2 * 16  # keys and values, layers, heads, head_dim
    options = EngineOptions(cache_mib=1, index_bytes=3 * per_token)
    engine = load_engine(ModelSource("tiny", folder), options=options)
    assert engine.usage.max_tokens == (1 << 20) // (4 * per_token)
