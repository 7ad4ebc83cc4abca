"""NaN and infinity: found at start, and in a pass without harm to other sequences."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from amusd.engine.interface import NO_TOKEN, EngineOptions, ScheduledSequence, WeightFormat
from amusd.engine.loading.model_source import LoadedModel, ModelSource
from amusd.engine.model_engine import ModelEngine, load_engine
from amusd.engine.native.library import unavailable_reason
from amusd.engine.native.native_model import NativeModel
from amusd.engine.native.native_runner import NativeRunner
from amusd.engine.reference import decode_autoregressive
from amusd.engine.runners.finite_check import refuse_not_finite
from amusd.engine.runners.padded import PaddedRunner
from amusd.engine.runners.ragged import RaggedRunner
from amusd.engine.runners.runner import Chunk, ModelRunner
from amusd.engine.runners.shape_buckets import Buckets
from amusd.engine.runners.unbatched import UnbatchedRunner
from amusd.engine.sampling.sampler import GREEDY
from amusd.fleet.model_description import ModelDescription
from amusd.fleet.vocabulary import Vocabulary
from amusd.protocol.errors import InvalidInputError
from tests import tiny
from tests.engine.row_engine import row_engine

BAD = 250  # the text of no check at start has it
CONTEXT = 400
DESCRIPTION = ModelDescription("tiny", "cpu", "float32", 0, CONTEXT, tiny.VOCABULARY, Vocabulary(0))
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
NUM_ROWS = 4


def broken_at(token: int, value: float) -> PreTrainedModel:
    """Return a model that computes NaN or infinity after ``token``."""
    model = tiny.build("llama")
    torch.nn.Module.eval(model)
    embedding: Any = model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight[token] = value
    return model


def native(model: PreTrainedModel, num_threads: int = 2) -> NativeRunner:
    if unavailable_reason() is not None:
        pytest.skip(f"no native engine: {unavailable_reason()}")
    return NativeRunner(NativeModel(model, WeightFormat.PLAIN), GREEDY, CONTEXT, num_threads)


RUNNERS: dict[str, Callable[[PreTrainedModel], ModelRunner[Any]]] = {
    "native": native,
    "native alone": lambda model: native(model, 1),
    "ragged": RaggedRunner,
    "ragged exact": lambda model: RaggedRunner(model, pass_tokens=8),
    "padded": lambda model: PaddedRunner(model, Buckets.fast(NUM_ROWS, CONTEXT)),
    "padded exact": lambda model: PaddedRunner(model, Buckets.exact(NUM_ROWS, CONTEXT)),
    "unbatched": UnbatchedRunner,
}


@pytest.fixture(params=RUNNERS)
def engine(request: pytest.FixtureRequest) -> ModelEngine:
    runner = RUNNERS[request.param](broken_at(BAD, float("nan")))
    return row_engine(DESCRIPTION, runner, NUM_ROWS, CONTEXT)


def test_a_broken_sequence_has_no_token_and_others_keep_theirs(engine: ModelEngine) -> None:
    expected = decode_autoregressive(engine, PROMPT, 6)
    good, bad, late = (engine.open(40) for _ in range(3))
    outputs = engine.run(
        [
            ScheduledSequence(bad, [1, BAD, 2], 2),
            ScheduledSequence(good, PROMPT, 1),
            ScheduledSequence(late, [7, 8, BAD], 2),
        ]
    )
    assert outputs[0] == [NO_TOKEN, NO_TOKEN]
    assert outputs[2][0] != NO_TOKEN
    assert outputs[2][1] == NO_TOKEN
    found = outputs[1]
    for _ in range(5):
        batch = [ScheduledSequence(bad, [5], 1), ScheduledSequence(good, found[-1:], 1)]
        broken, [token] = engine.run(batch)
        assert broken == [NO_TOKEN]
        found.append(token)
    assert found == expected


def test_a_rolled_back_token_leaves_nothing_behind(engine: ModelEngine) -> None:
    expected = decode_autoregressive(engine, PROMPT, 4)
    slot = engine.open(40)
    found = engine.run([ScheduledSequence(slot, [*PROMPT, 11, BAD, 12], 4)])[0]
    assert found[0] == expected[0]
    assert found[2:] == [NO_TOKEN, NO_TOKEN]
    output = found[:1]
    for _ in range(3):
        engine.truncate(slot, len(PROMPT) + len(output) - 1)
        # A wrong proposal that breaks, again and again.
        output.append(engine.run([ScheduledSequence(slot, [output[-1], BAD], 2)])[0][0])
    assert output == expected


@pytest.mark.parametrize("num_outputs", [0, 1])
def test_a_closed_sequence_leaves_nothing_behind(engine: ModelEngine, num_outputs: int) -> None:
    expected = decode_autoregressive(engine, PROMPT, 4)
    slots = [engine.open(40) for _ in range(NUM_ROWS)]
    broken = [BAD, *range(30)]
    engine.run([ScheduledSequence(slot, broken, num_outputs) for slot in slots])
    for slot in slots:
        engine.close(slot)
    assert decode_autoregressive(engine, PROMPT, 4) == expected


def test_an_infinite_score_does_not_pass_as_a_number() -> None:
    model = broken_at(BAD, 1.0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(1e20)
            layer.self_attn.k_proj.weight.mul_(1e20)
    runner = native(model)
    buffer = runner.allocate(8)
    assert runner.tokens([Chunk(buffer, 0, PROMPT, 1)]) == [NO_TOKEN]


# At start


@pytest.mark.parametrize("options", [EngineOptions(), EngineOptions(weights=WeightFormat.INT8)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_refused_and_named(
    tmp_path: Path, value: float, options: EngineOptions
) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = value
    source = ModelSource("tiny", tiny.save(model, tmp_path))
    with pytest.raises(InvalidInputError) as caught:
        load_engine(source, options=options)
    assert "weight model.layers.1.mlp.down_proj.weight does not stay finite" in str(caught.value)
    assert "the weights are broken" in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "advice"), [("float16", "--dtype bfloat16 or float32"), ("bfloat16", "float32")]
)
def test_an_overflow_is_refused_with_the_dtype_to_use(
    tmp_path: Path, dtype: str, advice: str
) -> None:
    model = tiny.build("llama")
    factor = 1e5 if dtype == "float16" else 1e38
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(factor)
    folder = tiny.save(model, tmp_path)
    with pytest.raises(InvalidInputError, match=f"cannot be served in {dtype}: .*{advice}"):
        load_engine(ModelSource("tiny", folder, dtype=dtype))


def test_a_head_that_masks_some_tokens_with_infinity_is_finite() -> None:
    model = tiny.build("llama")
    forward = model.forward

    def masked(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        output.logits[..., 200:] = -torch.inf
        return output

    model.forward = masked
    refuse_not_finite(LoadedModel(model, DESCRIPTION))
