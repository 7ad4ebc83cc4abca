"""The padded runner: fixed shapes give the tokens of the unbatched runner."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from amusd.engine.interface import EngineOptions, ScheduledSequence
from amusd.engine.loading.model_source import LoadedModel, ModelSource, load_source
from amusd.engine.model_engine import ModelEngine, load_engine
from amusd.engine.reference import decode_autoregressive, decode_speculative
from amusd.engine.runners.graph_capture import Function, Replay
from amusd.engine.runners.padded import PaddedRunner
from amusd.engine.runners.shape_buckets import Buckets, Shape
from amusd.protocol.errors import CacheFullError, InvalidInputError
from tests import tiny
from tests.engine.row_engine import row_engine

pytestmark = pytest.mark.usefixtures("without_native_runner")

FAMILIES = ["llama", "qwen2", "mistral", "gpt2"]
PROMPT = [i * 29 % 256 for i in range(1, 100)]
NUM_ROWS, LENGTH = 4, 400
BUCKETS = Buckets.fast(NUM_ROWS, LENGTH)


class Recorded:
    """A capture that reuses its tensors as a graph does, and counts its calls."""

    def __init__(self) -> None:
        self.num_captured = 0
        self.num_replays = 0

    def __call__(self, function: Function, inputs: Tensor) -> Replay:
        self.num_captured += 1
        outputs = function(inputs)  # a warm-up must leave no trace

        def replay() -> tuple[Tensor, Tensor]:
            self.num_replays += 1
            for known, new in zip(outputs, function(inputs), strict=True):
                known.copy_(new)
            return outputs

        return replay


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tiny.save(tiny.build(request.param), tmp_path_factory.mktemp(request.param))
    return load_source(ModelSource("tiny", folder))


def engine_of(
    loaded: LoadedModel, capture: Recorded | None = None, reuses: bool = True
) -> ModelEngine:
    runner = PaddedRunner(loaded.model, BUCKETS, capture=capture or Recorded())
    return engine_with(loaded, runner, reuses)


def engine_with(loaded: LoadedModel, runner: PaddedRunner, reuses: bool = True) -> ModelEngine:
    return row_engine(loaded.description, runner, NUM_ROWS, LENGTH, reuse_prefixes=reuses)


def test_it_writes_what_the_unbatched_runner_writes(loaded: LoadedModel, tmp_path: Path) -> None:
    options = EngineOptions(max_batch=1)
    folder = tiny.save(loaded.model, tmp_path)
    unbatched = load_engine(ModelSource("unbatched", folder), options=options)
    padded = engine_of(loaded)
    expected = decode_autoregressive(unbatched, PROMPT, 60)
    assert decode_autoregressive(padded, PROMPT, 60) == expected
    draft = engine_of(LoadedModel(tiny.perturbed(loaded.model, 0.05), loaded.description))
    assert decode_speculative(draft, padded, PROMPT, 60, lookahead=5) == expected


def test_each_sequence_of_a_batch_writes_what_it_writes_alone(loaded: LoadedModel) -> None:
    engine = engine_of(loaded)
    prompts = [PROMPT[:3], PROMPT[5:95], PROMPT[2:30], PROMPT[50:51]]
    expected = [decode_autoregressive(engine, prompt, 8) for prompt in prompts]
    slots = [engine.open(len(prompt) + 8) for prompt in prompts]
    batch = [
        ScheduledSequence(slot, prompt, 1) for slot, prompt in zip(slots, prompts, strict=True)
    ]
    written: list[list[int]] = [[] for _ in prompts]
    for _ in range(8):
        found = engine.run(batch)
        written = [text + tokens for text, tokens in zip(written, found, strict=True)]
        batch = [
            ScheduledSequence(slot, text[-1:], 1) for slot, text in zip(slots, written, strict=True)
        ]
    assert written == expected


def test_the_model_stays_usable_in_the_usual_way(loaded: LoadedModel) -> None:
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        before = loaded.model(input_ids=ids).logits
        decode_autoregressive(engine_of(loaded), PROMPT, 3)
        assert torch.equal(loaded.model(input_ids=ids).logits, before)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tiny.save(tiny.build("llama"), tmp_path_factory.mktemp("llama"))
    return load_source(ModelSource("tiny", folder))


def test_after_the_warm_up_no_session_waits_for_a_capture(llama: LoadedModel) -> None:
    capture = Recorded()
    runner = PaddedRunner(llama.model, BUCKETS, capture=capture)
    num_shapes = runner.warm_up()
    assert capture.num_captured == num_shapes == len(BUCKETS.shapes())
    engine = engine_with(llama, runner)
    slots = [engine.open(300) for _ in range(NUM_ROWS)]
    engine.run([ScheduledSequence(slot, PROMPT * 2, 1) for slot in slots])
    engine.run([ScheduledSequence(slot, [1, 2, 3], 3) for slot in slots[:2]])
    assert capture.num_captured == num_shapes
    assert capture.num_replays == 5  # 198 tokens a row in chunks of 64, then one pass


def test_a_pass_has_the_smallest_shape_that_fits() -> None:
    assert Buckets((1, 2, 4), (1, 2, 4, 8, 16, 32, 64), (256, 400)) == BUCKETS
    assert BUCKETS.fit(batch=3, query_length=5, kv_length=256) == Shape(4, 8, 256)
    assert BUCKETS.fit(batch=1, query_length=1, kv_length=257) == Shape(1, 1, 400)
    assert Buckets.exact(4, 400).shapes() == [Shape(4, 8, 400)]
    wide = Buckets.fast(32, 256)
    assert wide.query_limit(32) == 16
    assert all(shape.batch * shape.query_length <= 512 for shape in wide.shapes())


def test_rows_are_freed_and_the_oldest_retained_sequence_is_evicted(llama: LoadedModel) -> None:
    engine = engine_of(llama)
    for start in range(6):  # each leaves a retained sequence
        slot = engine.open(50)
        engine.run([ScheduledSequence(slot, PROMPT[start : start + 40], 1)])
        engine.close(slot)
    assert engine.usage.num_retained == LENGTH
    slots = [engine.open(50) for _ in range(NUM_ROWS)]
    assert engine.usage.num_reserved == NUM_ROWS * LENGTH
    with pytest.raises(CacheFullError):
        engine.open(1)
    engine.close(slots[1])
    engine.close(engine.open(1))
    with pytest.raises(InvalidInputError):
        engine.open(LENGTH + 1)


def test_sessions_that_repeat_one_prompt_do_not_use_up_the_rows(llama: LoadedModel) -> None:
    engine = engine_of(llama)
    for _ in range(2 * NUM_ROWS):
        slot = engine.open(50)
        engine.run([ScheduledSequence(slot, PROMPT[:40], 1)])
        engine.close(slot)
    slots = [engine.open(50) for _ in range(NUM_ROWS)]
    assert len({engine._cache[slot] for slot in slots}) == NUM_ROWS


def test_a_retained_prefix_is_copied_from_row_to_row(llama: LoadedModel) -> None:
    engine, without = engine_of(llama), engine_of(llama, reuses=False)
    retained = engine.open(120)
    engine.run([ScheduledSequence(retained, PROMPT[:60], 1)])
    engine.close(retained)
    slot, other = engine.open(120), without.open(120)
    assert engine.reuse(slot, PROMPT) == 60
    assert without.reuse(other, PROMPT) == 0
    [found] = engine.run([ScheduledSequence(slot, PROMPT[60:], 5)])
    assert [found] == without.run([ScheduledSequence(other, PROMPT, 5)])
