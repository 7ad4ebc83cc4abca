"""The ragged runner: each sequence of a batch gets the tokens of the unbatched runner."""

import random

import pytest

from amusd.engine.interface import EngineOptions, ScheduledSequence
from amusd.engine.loading.model_source import ModelSource
from amusd.engine.model_engine import ModelEngine, load_engine
from amusd.engine.reference import decode_autoregressive
from tests import tiny

FAMILIES = ["llama", "qwen2", "mistral", "gpt2"]


pytestmark = pytest.mark.usefixtures("without_native_runner")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tiny.build(request.param), tmp_path_factory.mktemp(request.param))


@pytest.fixture
def unbatched(folder: str) -> ModelEngine:
    return load_engine(ModelSource("tiny", folder), options=EngineOptions(max_batch=1))


@pytest.fixture
def ragged(folder: str) -> ModelEngine:
    engine = load_engine(ModelSource("tiny", folder), options=EngineOptions(max_batch=16))
    assert engine.max_batch == 16
    return engine


def test_sixteen_sequences_that_join_leave_and_roll_back_write_what_each_writes_alone(
    unbatched: ModelEngine, ragged: ModelEngine
) -> None:
    rng = random.Random(1)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(1, 40))] for _ in range(16)]
    lengths = [rng.randint(5, 40) for _ in prompts]
    expected = [
        decode_autoregressive(unbatched, prompt, length)
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    waiting = list(range(16))
    slots: dict[int, int] = {}
    texts: dict[int, list[int]] = {}
    while waiting or slots:
        while waiting and (len(slots) < 3 or rng.random() < 0.5):
            name = waiting.pop()
            slots[name] = ragged.open(120)
            texts[name] = list(prompts[name])
        batch = {}
        for name in rng.sample(sorted(slots), rng.randint(1, len(slots))):
            rest = texts[name][ragged.length(slots[name]) :]
            wrong = [rng.randrange(256) for _ in range(rng.randint(0, 4))]
            batch[name] = ScheduledSequence(slots[name], rest + wrong, len(wrong) + 1)
        found = ragged.run(list(batch.values()))
        for name, tokens in zip(batch, found, strict=True):
            texts[name].append(tokens[0])  # wrong tokens are rolled back
            ragged.truncate(slots[name], len(texts[name]) - 1)
            if len(texts[name]) == len(prompts[name]) + lengths[name]:
                assert texts[name][len(prompts[name]) :] == expected[name]
                ragged.close(slots.pop(name))
    assert ragged.num_open == 0


def test_a_chunked_prefill_beside_others_gives_the_token_of_a_whole_one(
    unbatched: ModelEngine, ragged: ModelEngine
) -> None:
    prompt = [i * 11 % 256 for i in range(1, 41)]
    [expected] = decode_autoregressive(unbatched, prompt, 1)
    slot, other = ragged.open(60), ragged.open(60)
    assert ragged.run([ScheduledSequence(slot, prompt[:17], 0)]) == [[]]
    assert [
        len(one)
        for one in ragged.run(
            [ScheduledSequence(other, [1], 1), ScheduledSequence(slot, prompt[17:20], 0)]
        )
    ] == [1, 0]
    _, found = ragged.run(
        [ScheduledSequence(other, [2], 1), ScheduledSequence(slot, prompt[20:], 1)]
    )
    assert found == [expected]
