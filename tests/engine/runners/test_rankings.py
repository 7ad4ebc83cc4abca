"""Next-best tokens: every runner gives those of the model, at the outputs of any batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from amusd.engine.interface import NO_TOKEN, EngineOptions, ScheduledSequence, WeightFormat
from amusd.engine.loading.model_source import LoadedModel
from amusd.engine.model_engine import ModelEngine, serve
from amusd.engine.native.library import unavailable_reason
from amusd.engine.native.native_model import NativeModel
from amusd.engine.native.native_runner import NativeRunner
from amusd.engine.runners.padded import PaddedRunner
from amusd.engine.runners.ragged import RaggedRunner
from amusd.engine.runners.rope_switching import RopeSwitchingRunner
from amusd.engine.runners.runner import ModelRunner
from amusd.engine.runners.shape_buckets import Buckets
from amusd.engine.runners.unbatched import UnbatchedRunner
from amusd.engine.sampling.sampler import Sampler
from amusd.fleet.model_description import ModelDescription
from amusd.fleet.vocabulary import Vocabulary
from amusd.protocol.errors import InvalidInputError
from tests import tiny
from tests.engine.row_engine import row_engine

CONTEXT, NUM_ROWS, NUM_ALTERNATIVES = 400, 4, 3
DESCRIPTION = ModelDescription("tiny", "cpu", "float32", 0, CONTEXT, tiny.VOCABULARY, Vocabulary(0))
PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8], [250])
HEAD_IDS = torch.arange(tiny.VOCABULARY).flip(0)
HALF = tiny.VOCABULARY // 2


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    found = tiny.build("llama")
    torch.nn.Module.eval(found)
    return found


def native(model: PreTrainedModel, sampler: Sampler, num_threads: int = 2) -> NativeRunner:
    if unavailable_reason() is not None:
        pytest.skip(f"no native engine: {unavailable_reason()}")
    weights = NativeModel(model, WeightFormat.COMPACT, sampler.num_outputs)
    return NativeRunner(weights, sampler, CONTEXT, num_threads)


RUNNERS: dict[str, Callable[[PreTrainedModel, Sampler], ModelRunner[Any]]] = {
    "native": native,
    "native alone": lambda model, sampler: native(model, sampler, 1),
    "native, 9 threads": lambda model, sampler: native(model, sampler, 9),  # 6 panels
    "ragged": RaggedRunner,
    "ragged exact": lambda model, sampler: RaggedRunner(model, sampler, pass_tokens=8),
    "padded": lambda model, sampler: PaddedRunner(model, Buckets.fast(NUM_ROWS, CONTEXT), sampler),
    "unbatched": UnbatchedRunner,
    "rope switching": lambda model, sampler: RopeSwitchingRunner(
        UnbatchedRunner(model, sampler), 100, sampler
    ),
}


def engine_of(runner: ModelRunner[Any], num_alternatives: int = NUM_ALTERNATIVES) -> ModelEngine:
    return row_engine(DESCRIPTION, runner, NUM_ROWS, CONTEXT, num_alternatives=num_alternatives)


def probabilities_of(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(torch.tensor([tokens])).logits[0, -1].softmax(dim=-1)
    return found


@pytest.mark.parametrize("name", RUNNERS)
@pytest.mark.parametrize("is_reduced", [False, True])
def test_every_runner_gives_the_next_best_tokens(
    name: str, is_reduced: bool, model: PreTrainedModel
) -> None:
    ids = HEAD_IDS if is_reduced else torch.arange(tiny.VOCABULARY)
    num_outputs = HALF if is_reduced else None
    sampler = Sampler(HEAD_IDS if is_reduced else None, num_outputs, NUM_ALTERNATIVES)
    engine = engine_of(RUNNERS[name](model, sampler))
    slots = [engine.open(20) for _ in PROMPTS]
    texts = [list(prompt) for prompt in PROMPTS]
    for _ in range(3):
        batch = [
            ScheduledSequence(slot, text[engine.length(slot) :], 1)
            for slot, text in zip(slots, texts, strict=True)
        ]
        outputs = engine.run(batch)
        for slot, text, [token] in zip(slots, texts, outputs, strict=True):
            expected = probabilities_of(model, text)
            if is_reduced:  # the softmax covers the rows that are sampled
                expected = expected[:HALF] / expected[:HALF].sum()
            best = expected.topk(1 + NUM_ALTERNATIVES)
            assert [token, *engine.alternatives(slot)] == ids[best.indices].tolist()
            assert engine.probabilities(slot) == pytest.approx(best.values.tolist(), rel=1e-3)
            text.append(token)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 9])
def test_of_equal_logits_the_first_rows_are_ahead_for_any_number_of_threads(
    num_threads: int,
) -> None:
    model = tiny.build("llama")
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        head.weight.copy_(head.weight[:20].repeat(13, 1)[: tiny.VOCABULARY])
    engine = engine_of(native(model, Sampler(num_alternatives=4), num_threads), 4)
    slot = engine.open(20)
    [[token]] = engine.run([ScheduledSequence(slot, PROMPTS[0], 1)])
    best = int(probabilities_of(model, PROMPTS[0])[:20].argmax())
    assert [token, *engine.alternatives(slot)] == [best + 20 * rank for rank in range(5)]


@pytest.mark.parametrize("name", ["native", "native alone", "ragged", "padded", "unbatched"])
def test_an_output_that_is_not_finite_has_no_alternatives_and_others_keep_theirs(
    name: str,
) -> None:
    model = tiny.build("llama")
    embedding: Any = model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight[251] = float("nan")
    engine = engine_of(RUNNERS[name](model, Sampler(num_alternatives=NUM_ALTERNATIVES)))
    bad, good = engine.open(20), engine.open(20)
    batch = [ScheduledSequence(bad, [1, 251], 1), ScheduledSequence(good, PROMPTS[0], 1)]
    assert engine.run(batch)[0] == [NO_TOKEN]
    assert not engine.alternatives(bad)
    expected = probabilities_of(model, PROMPTS[0]).topk(1 + NUM_ALTERNATIVES).indices.tolist()
    assert list(engine.alternatives(good)) == expected[1:]


def test_alternatives_belong_to_the_last_output_and_end_with_the_sequence(
    model: PreTrainedModel,
) -> None:
    engine = engine_of(RaggedRunner(model, Sampler(num_alternatives=NUM_ALTERNATIVES)))
    slot = engine.open(20)
    engine.run([ScheduledSequence(slot, PROMPTS[0][:3], 0)])
    assert not engine.alternatives(slot)
    engine.run([ScheduledSequence(slot, PROMPTS[0][3:], 2)])
    found = engine.alternatives(slot)
    assert list(found) == probabilities_of(model, PROMPTS[0]).topk(4).indices.tolist()[1:]
    engine.close(slot)
    assert not engine.alternatives(engine.open(20))


def test_an_engine_gives_as_many_alternatives_as_its_options_say(model: PreTrainedModel) -> None:
    loaded = LoadedModel(model, DESCRIPTION)
    for options, num_alternatives in ((EngineOptions(), 0), (EngineOptions(num_alternatives=2), 2)):
        engine = serve(loaded, options)
        slot = engine.open(20)
        engine.run([ScheduledSequence(slot, PROMPTS[0], 1)])
        assert engine.num_alternatives == len(engine.alternatives(slot)) == num_alternatives
    with pytest.raises(InvalidInputError, match="use 0 to 4"):
        EngineOptions(num_alternatives=5)
