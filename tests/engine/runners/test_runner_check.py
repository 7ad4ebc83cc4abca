"""The comparison of runners with the model alone: what it notices, allows and costs."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from amusd.engine.loading.model_source import LoadedModel
from amusd.engine.runners import ragged_attention
from amusd.engine.runners.ragged import RaggedRunner
from amusd.engine.runners.runner import RunnerRefusedError
from amusd.engine.runners.runner_check import RunnerCheck
from amusd.engine.runners.self_check import relative_error
from amusd.engine.runners.unbatched import UnbatchedRunner
from amusd.fleet.model_description import ModelDescription
from amusd.fleet.vocabulary import Vocabulary
from tests import tiny

CONTEXT = 400
DESCRIPTION = ModelDescription("tiny", "cpu", "float32", 1000, CONTEXT, 256, Vocabulary(0))

pytestmark = pytest.mark.usefixtures("_inference")


@pytest.fixture(name="_inference")
def inference() -> Any:
    with torch.inference_mode():
        yield


def windowed(window: int, initializer_range: float = 0.3) -> LoadedModel:
    torch.manual_seed(3)
    settings = tiny.COMMON | tiny.NO_SPECIAL | {"initializer_range": initializer_range}
    model = MistralForCausalLM(MistralConfig(**settings, sliding_window=window))
    return LoadedModel(model, DESCRIPTION)


@pytest.mark.parametrize("initializer_range", [0.3, 0.02])
@pytest.mark.parametrize("window", [8, 100])
def test_a_runner_that_ignores_a_window_is_noticed_beyond_it(
    window: int, initializer_range: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = windowed(window, initializer_range)
    check = RunnerCheck(loaded, None, CONTEXT)
    assert check.length == max(16, window + 4)
    check.refuse_if_wrong(UnbatchedRunner(loaded.model))
    monkeypatch.setattr(ragged_attention, "refuse_variants", lambda *_: None)
    with pytest.raises(RunnerRefusedError, match="its logits differ from those of the model alone"):
        check.refuse_if_wrong(RaggedRunner(loaded.model))


def test_nan_is_no_small_difference() -> None:
    loaded = windowed(100)
    check = RunnerCheck(loaded, None, CONTEXT)
    loaded.model.lm_head.weight[3, 3] = math.nan
    with pytest.raises(RunnerRefusedError, match="by nan of their size"):
        check.refuse_if_wrong(UnbatchedRunner(loaded.model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_good_runner_passes_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    sizes = tiny.COMMON | tiny.NO_SPECIAL | {"num_hidden_layers": 16, "initializer_range": 0.1}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    nn.Module.to(model, dtype)
    check = RunnerCheck(LoadedModel(model, DESCRIPTION), None, CONTEXT)
    check.refuse_if_wrong(RaggedRunner(model))
    assert 0 < check.difference < 0.05


def test_the_largest_row_counts_relative_to_its_spread() -> None:
    expected = torch.tensor([[101.0, 99.0], [1.0, -1.0]])
    assert relative_error(expected, expected) == 0
    assert relative_error(expected + torch.tensor([[0.0], [1.0]]), expected) == 1
    assert relative_error(-expected[1:], expected[1:]) == 2
    assert math.isnan(relative_error(expected * math.nan, expected))
    assert relative_error(expected[:, :1], expected) == 0


def test_a_large_model_is_checked_with_short_texts_and_the_log_says_so() -> None:
    loaded = windowed(100)
    large = replace(loaded, description=replace(DESCRIPTION, num_parameters=8 * 10**9))
    check = RunnerCheck(large, None, CONTEXT)
    check.refuse_if_wrong(UnbatchedRunner(loaded.model))
    assert check.length == 16
    assert "texts of up to 16 tokens, not beyond 100 tokens, which takes too long" in str(check)
    assert "not beyond" not in str(RunnerCheck(loaded, None, CONTEXT))


def test_no_text_is_longer_than_the_context() -> None:
    loaded = windowed(100)
    assert RunnerCheck(loaded, None, 102).length == 16
    assert RunnerCheck(loaded, None, 9).length == 9
    RunnerCheck(loaded, None, 9).refuse_if_wrong(UnbatchedRunner(loaded.model))
    assert RunnerCheck(loaded, 60, CONTEXT).shortened(50).length == 16
