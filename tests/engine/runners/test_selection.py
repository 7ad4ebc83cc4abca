"""How a model is run: which passes are chosen, what the log says, what is refused."""

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
from amusd.engine.runners import selection as choice
from amusd.engine.runners.graph_capture import direct
from amusd.engine.runners.padded import PaddedRunner
from amusd.engine.runners.ragged import RaggedRunner
from amusd.engine.runners.runner import refuse_variants
from amusd.engine.runners.selection import select_runner
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


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def greedy(loaded: LoadedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """The model's own answer, without any cache."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(num_tokens):
            logits = loaded.model(input_ids=torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_a_plain_model_shares_passes_and_nothing_is_said(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = select_runner(load_source(ModelSource("tiny", folder)), EngineOptions())
    assert isinstance(found.passes, RaggedRunner)
    assert found.max_batch == 32
    assert warnings_of(caplog) == []


def test_a_window_takes_turns_and_the_log_says_why(
    windowed: str, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_source(ModelSource("windowed", windowed))
    engine = serve(loaded)
    assert engine.max_batch == 1
    assert warnings_of(caplog) == [
        "windowed runs one session a pass: some of its layers attend to a window only"
    ]
    expected = greedy(loaded, PROMPT, 20)
    assert decode_autoregressive(engine, PROMPT, 20) == expected
    draft = serve(LoadedModel(tiny.perturbed(loaded.model, 0.05), loaded.description))
    assert decode_speculative(draft, engine, PROMPT, 20, lookahead=4) == expected


def test_eager_attention_takes_turns_and_the_log_says_why(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_source(ModelSource("eager", folder))
    loaded.model.set_attn_implementation("eager")
    engine = serve(loaded)
    assert isinstance(select_runner(loaded, EngineOptions()).passes, UnbatchedRunner)
    assert "one session a pass: its attention is eager, not sdpa" in warnings_of(caplog)[0]
    assert decode_autoregressive(engine, PROMPT, 10) == greedy(loaded, PROMPT, 10)


Forward = Callable[..., Any]


def test_a_model_that_differs_in_shared_passes_takes_turns(
    folder: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_source(ModelSource("odd", folder))
    forward: Forward = loaded.model.forward

    def odd(*args: Any, **kwargs: Any) -> Any:  # sees how many tokens share its pass
        output = forward(*args, **kwargs)
        if "packed" in kwargs:
            output.logits = output.logits * len(kwargs["packed"].sizes)
        return output

    monkeypatch.setattr(loaded.model, "forward", odd)
    assert serve(loaded).max_batch == 1
    assert "differ from those it gives alone" in warnings_of(caplog)[0]


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
    assert isinstance(engine._slots[engine.open(10)], CopyingCache)
    assert "only the cache of Transformers fits it" in warnings_of(caplog)[0]
    expected = greedy(loaded, PROMPT, 20)
    assert decode_autoregressive(engine, PROMPT, 20) == expected
    draft = serve(LoadedModel(tiny.perturbed(tiny.build("llama"), 0.05), loaded.description))
    assert decode_speculative(draft, engine, PROMPT, 20, lookahead=4) == expected
    kept, slot = engine.open(60), engine.open(60)
    engine.run([ScheduledSequence(kept, list(range(40)), 1)])
    assert engine.reuse(slot, list(range(50))) == 0
    with pytest.raises(InvalidInputError, match="exact cannot be promised"):
        serve(loaded, EXACT)


def test_exact_is_refused_where_sessions_cannot_share_passes(windowed: str) -> None:
    with pytest.raises(InvalidInputError, match=r"attend to a window only; use numerics fast"):
        load_engine(ModelSource("windowed", windowed), options=EXACT)


def test_the_limit_counts_what_keys_and_values_really_take(folder: str) -> None:
    engine: ModelEngine = load_engine(
        ModelSource("tiny", folder, dtype="bfloat16"), options=EngineOptions(cache_mib=1)
    )
    bytes_per_token = 2 * 2 * 2 * 16 * 2  # layers, keys and values, heads, head size, bfloat16
    assert engine.usage.max_tokens == (1 << 20) // bytes_per_token


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose as for CUDA, and run without graphs."""
    monkeypatch.setattr(choice._Case, "on_cuda", True)
    monkeypatch.setattr(choice, "CudaGraphs", lambda _: direct)


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("numerics", list(Numerics))
def test_cuda_gets_passes_of_fixed_shapes(folder: str, numerics: Numerics) -> None:
    loaded = load_source(ModelSource("tiny", folder))
    options = EngineOptions(max_batch=2, cache_mib=8, numerics=numerics)
    engine = serve(loaded, options)
    assert isinstance(engine._passes, PaddedRunner)
    assert engine.max_batch == 2
    assert engine.usage.max_tokens == 2 * 448  # the context in whole units, for each session
    assert decode_autoregressive(engine, PROMPT, 10) == greedy(loaded, PROMPT, 10)


@pytest.mark.usefixtures("as_on_cuda")
def test_cuda_without_graphs_packs_passes_and_the_log_says_why(
    folder: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(_: torch.device) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(choice, "CudaGraphs", failing)
    engine = load_engine(ModelSource("tiny", folder), options=EngineOptions(cache_mib=16))
    assert isinstance(engine._passes, RaggedRunner)
    assert "tiny runs without CUDA graphs: RuntimeError" in warnings_of(caplog)[0]


@pytest.mark.usefixtures("as_on_cuda")
def test_too_little_memory_for_all_sessions_is_refused(folder: str) -> None:
    options = EngineOptions(max_batch=200, cache_mib=1)
    with pytest.raises(InvalidInputError, match="no room for 200 sessions"):
        load_engine(ModelSource("tiny", folder), options=options)


def test_attention_of_another_kind_is_not_taken_for_plain() -> None:
    refuse_variants({"sliding_window": None, "dropout": 0.0})
    with pytest.raises(NotImplementedError, match="softcap"):
        refuse_variants({"softcap": 30.0})
