"""Numerics exact: a token's logits have the same bits in any batch and after any chunks."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from amusd.engine.interface import EngineOptions, Numerics, ScheduledSequence
from amusd.engine.loading.model_source import LoadedModel, ModelSource, load_source
from amusd.engine.model_engine import ModelEngine, load_engine, serve
from amusd.engine.reference import decode_autoregressive, decode_speculative
from amusd.engine.runners import selection as selection_module
from amusd.engine.runners.padded import PaddedRunner
from amusd.engine.runners.runner import Chunk
from amusd.engine.runners.self_check import same_to_the_bit
from amusd.engine.runners.shape_buckets import Buckets
from amusd.protocol.errors import InvalidInputError
from tests import tiny
from tests.engine.row_engine import row_engine

FAMILIES = ["llama", "qwen2", "mistral", "gpt2"]
DTYPES = ["float32", "bfloat16", "float16"]
EXACT = EngineOptions(max_batch=4, cache_mib=8, numerics=Numerics.EXACT)
FAST = EngineOptions(max_batch=4, cache_mib=8)


pytestmark = pytest.mark.usefixtures("without_native_runner")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tiny.build(request.param), tmp_path_factory.mktemp(request.param))


def ragged(loaded: LoadedModel) -> ModelEngine:
    return serve(loaded, EXACT)


def padded(loaded: LoadedModel) -> ModelEngine:
    """The runner on CUDA with numerics exact, without graphs."""
    num_rows, length = 5, 192
    runner = PaddedRunner(loaded.model, Buckets.exact(num_rows, length))
    return row_engine(
        loaded.description, runner, num_rows, length, max_batch=4, reuse_prefixes=True
    )


Maker = Callable[[LoadedModel], ModelEngine]


@pytest.fixture(params=[ragged, padded])
def make(request: pytest.FixtureRequest) -> Maker:
    found: Maker = request.param
    return found


def one_by_one(engine: ModelEngine, text: list[int]) -> Tensor:
    """Logits after each token of a text, one token a batch: [tokens, head]."""
    slot = engine.open(len(text))
    rows = [engine.logits([ScheduledSequence(slot, [token], 1)]) for token in text]
    engine.close(slot)
    return torch.cat(rows)


def at_random(engine: ModelEngine, texts: list[list[int]], rng: random.Random) -> list[Tensor]:
    """Logits after each token of each text: random chunks, batches and rollbacks."""
    slots = {engine.open(rng.randint(len(text) + 12, 150)): text for text in texts}
    found: dict[int, list[Tensor]] = {slot: [] for slot in slots}
    while any(len(found[slot]) < len(text) for slot, text in slots.items()):
        batch = []
        for slot in rng.sample(sorted(slots), rng.randint(1, len(slots))):
            rest = slots[slot][engine.length(slot) :][: rng.choice((1, 2, 5, 13))]
            wrong = [rng.randrange(256) for _ in range(rng.choice((0, 0, 3, 10)))]
            if rest:
                batch.append((ScheduledSequence(slot, rest + wrong, len(rest + wrong)), len(rest)))
        if not batch:
            continue
        outputs = engine.logits([scheduled for scheduled, _ in batch])
        for scheduled, num_right in batch:
            found[scheduled.slot] += list(outputs[:num_right])
            outputs = outputs[scheduled.num_outputs :]
            engine.truncate(scheduled.slot, len(found[scheduled.slot]))
    for slot in slots:
        engine.close(slot)
    return [torch.stack(found[slot]) for slot in slots]


def random_texts(rng: random.Random) -> list[list[int]]:
    return [[rng.randrange(256) for _ in range(rng.randint(20, 60))] for _ in range(3)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_schedule_gives_the_bits_of_one_token_a_batch(
    folder: str, dtype: str, make: Maker
) -> None:
    engine = make(load_source(ModelSource("tiny", folder, dtype=dtype)))
    rng = random.Random(5)
    for _ in range(3):
        texts = random_texts(rng)
        expected = [one_by_one(engine, text) for text in texts]
        for found, one in zip(at_random(engine, texts, rng), expected, strict=True):
            assert torch.equal(found, one)
    assert engine.num_open == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_speculative_decoding_writes_the_same_in_any_dtype(
    folder: str, dtype: str, make: Maker
) -> None:
    engine = make(load_source(ModelSource("tiny", folder, dtype=dtype)))
    draft = load_engine(ModelSource("draft", folder))  # float32, so it differs now and then
    prompt = [i * 29 % 256 for i in range(1, 20)]
    expected = decode_autoregressive(engine, prompt, 60)
    for lookahead in (1, 4, 9):
        assert decode_speculative(draft, engine, prompt, 60, lookahead) == expected


def test_with_numerics_fast_bits_depend_on_the_schedule(tmp_path: Path) -> None:
    """Shows that the tests above can fail."""
    folder = tiny.save(tiny.build("llama"), tmp_path)
    engine = load_engine(ModelSource("tiny", folder, dtype="bfloat16"), options=FAST)
    rng = random.Random(5)
    differing = 0
    for _ in range(3):
        texts = random_texts(rng)
        expected = [one_by_one(engine, text) for text in texts]
        found = at_random(engine, texts, rng)
        differing += sum(not torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert differing > 0


def test_a_reused_prefix_has_the_bits_of_a_computed_one(folder: str, make: Maker) -> None:
    engine = make(load_source(ModelSource("tiny", folder, dtype="bfloat16")))
    text = [i * 13 % 256 for i in range(1, 50)]
    donor, slot = engine.open(60), engine.open(70)
    engine.run([ScheduledSequence(donor, text[:40], 0)])
    assert engine.reuse(slot, text) == 40
    engine.truncate(donor, 3)
    engine.run([ScheduledSequence(donor, [7] * 20, 1)])
    found = engine.logits([ScheduledSequence(slot, text[40:], 9)])
    engine.close(slot)
    engine.close(donor)
    assert torch.equal(found, one_by_one(engine, text)[40:])


def test_the_self_check_notices_shapes_that_depend_on_the_batch(folder: str) -> None:
    loaded = load_source(ModelSource("tiny", folder))
    runner = PaddedRunner(loaded.model, Buckets.fast(4, 192))
    assert not same_to_the_bit(runner, 256, num_places=8, num_buffers=2)


def test_a_model_that_fails_the_self_check_is_refused(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection_module, "same_to_the_bit", lambda *_: False)
    with pytest.raises(InvalidInputError, match="numerics exact cannot be promised for tiny"):
        load_engine(ModelSource("tiny", folder), options=EXACT)


def test_experts_are_refused_because_their_tokens_depend_on_the_batch(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(**tiny.COMMON, **tiny.NO_SPECIAL, num_local_experts=4)
    folder = tiny.save(MixtralForCausalLM(config), tmp_path)
    with pytest.raises(InvalidInputError, match=r"exact cannot be promised.*an expert"):
        load_engine(ModelSource("experts", folder), options=EXACT)


def test_a_part_of_a_chunk_has_the_outputs_of_its_tokens() -> None:
    chunk = Chunk("buffer", 10, [1, 2, 3, 4, 5], num_outputs=2)
    parts = [chunk.part(0, 2), chunk.part(2, 4), chunk.part(4, 5)]
    assert [(part.start, part.tokens, part.num_outputs) for part in parts] == [
        (10, [1, 2], 0),
        (12, [3, 4], 1),
        (14, [5], 1),
    ]
