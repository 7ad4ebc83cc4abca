"""The kernels against PyTorch's own, and what they promise beyond it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from amusd.engine.reduced_head import load_causal_lm
from amusd.engine.rows import RowsLinear, kernels, use_rows_kernels
from tests import tiny

pytestmark = pytest.mark.skipif(
    kernels() is None, reason="no C compiler when this was installed, or no AVX-512"
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def layer(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(inputs, outputs, bias=bias)
    assert use_rows_kernels(nn.Sequential(made)) == 1
    assert isinstance(made, RowsLinear)
    return made


@pytest.mark.parametrize("num_rows", [*range(1, 18), 40])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 1), (64, 7), (48, 192), (1536, 61)])
@torch.inference_mode()
def test_it_is_the_linear_layer(num_rows: int, inputs: int, outputs: int) -> None:
    made = layer(inputs, outputs, bias=True)
    values = torch.randn(num_rows, inputs)
    expected = F.linear(values, made.weight, made.bias)
    assert torch.allclose(made(values), expected, atol=1e-4)


@pytest.mark.parametrize("num_rows", range(1, 17))
@torch.inference_mode()
def test_a_row_is_the_same_to_the_bit_whatever_shares_its_pass(num_rows: int) -> None:
    made = layer(576, 100)
    values = torch.randn(16, 576)
    whole = made(values)
    for start in range(17 - num_rows):
        part = made(values[start : start + num_rows].clone())
        assert torch.equal(part, whole[start : start + num_rows])


@torch.inference_mode()
def test_shapes_and_views_are_taken_as_they_come() -> None:
    made = layer(32, 8)
    values = torch.randn(2, 32, 3).transpose(1, 2)  # not contiguous
    assert made(values).shape == (2, 3, 8)
    assert torch.allclose(made(values), F.linear(values, made.weight), atol=1e-5)
    assert made(torch.empty(0, 32)).shape == (0, 8)


def test_what_does_not_fit_stays_as_it_is() -> None:
    odd, half = nn.Linear(17, 4), nn.Linear(16, 4).bfloat16()
    assert use_rows_kernels(nn.Sequential(odd, half)) == 0
    assert type(odd) is type(half) is nn.Linear


def test_several_threads_keep_pytorchs_layers() -> None:
    torch.set_num_threads(2)
    assert use_rows_kernels(nn.Sequential(nn.Linear(16, 4))) == 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gpt2"])
@torch.inference_mode()
def test_a_model_answers_as_before(family: str) -> None:
    model, before = tiny.build(family), tiny.build(family)
    for one in (model, before):
        nn.Module.eval(one)
    for num_tokens in (1, 5, 30):
        ids = torch.arange(num_tokens)[None]
        expected = before(ids).logits
        use_rows_kernels(model)
        assert torch.allclose(model(ids).logits, expected, atol=1e-3)


def test_weights_that_were_one_stay_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    built = tiny.build("llama")
    built.config.tie_word_embeddings = True
    built.tie_weights()
    folder = tiny.save(built, tmp_path_factory.mktemp("tied"))
    model, _ = load_causal_lm(folder, torch.float32, "cpu")
    assert use_rows_kernels(model) > 0
    served: Any = model
    table = served.get_input_embeddings().weight
    head = served.get_output_embeddings().weight
    assert table.data_ptr() == head.data_ptr()
    original: Any = built.get_input_embeddings()
    assert torch.equal(table, original.weight)


@torch.inference_mode()
def test_a_norm_does_not_depend_on_what_shares_its_pass() -> None:
    model: Any = tiny.build("llama")
    norm = model.base_model.norm
    values = torch.randn(9, 64)
    expected = norm(values)
    use_rows_kernels(model)
    replaced = model.base_model.norm
    assert type(replaced) is not type(norm)
    assert torch.allclose(replaced(values), expected, atol=1e-5)
    assert torch.equal(replaced(values[4:5]), replaced(values)[4:5])


def test_the_weights_keep_their_names_and_values() -> None:
    model = tiny.build("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    use_rows_kernels(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
