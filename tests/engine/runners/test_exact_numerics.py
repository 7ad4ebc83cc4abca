"""Exact passes: a token's logits have the same bits however it comes to the model."""

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
from amusd.engine.runners import selection as choice
from amusd.engine.runners.padded import Buckets, PaddedRunner
from amusd.engine.runners.runner import Chunk
from amusd.engine.runners.selection import RunnerSelection
from amusd.engine.runners.self_check import same_to_the_bit
from amusd.protocol.errors import InvalidInputError
from tests import tiny

FAMILIES = ["llama", "qwen2", "mistral", "gpt2"]
DTYPES = ["float32", "bfloat16", "float16"]
EXACT = EngineOptions(max_batch=4, cache_mib=8, numerics=Numerics.EXACT)
FAST = EngineOptions(max_batch=4, cache_mib=8)


pytestmark = pytest.mark.usefixtures("without_native_runner")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tiny.build(request.param), tmp_path_factory.mktemp(request.param))


def packed(loaded: LoadedModel) -> ModelEngine:
    return serve(loaded, EXACT)


def static(loaded: LoadedModel) -> ModelEngine:
    """What runs on CUDA with numerics exact, without graphs."""
    num_rows, length = 5, 192
    passes = PaddedRunner(loaded.model, Buckets.exact(num_rows, length))
    tokens = num_rows * length
    return ModelEngine(
        loaded.description, RunnerSelection(passes, 4, True, tokens, length, unit=length)
    )


Maker = Callable[[LoadedModel], ModelEngine]


@pytest.fixture(params=[packed, static])
def make(request: pytest.FixtureRequest) -> Maker:
    found: Maker = request.param
    return found


def one_by_one(engine: ModelEngine, text: list[int]) -> Tensor:
    """Logits after each token of a text, one token a pass, alone: [tokens, head]."""
    slot = engine.open(len(text))
    rows = [engine.logits([ScheduledSequence(slot, [token], 1)]) for token in text]
    engine.close(slot)
    return torch.cat(rows)


def at_random(engine: ModelEngine, texts: list[list[int]], rng: random.Random) -> list[Tensor]:
    """Logits after each token of each text, all at once: random cuts, companions, rollbacks."""
    slots = {engine.open(rng.randint(len(text) + 12, 150)): text for text in texts}
    found: dict[int, list[Tensor]] = {slot: [] for slot in slots}
    while any(len(found[slot]) < len(text) for slot, text in slots.items()):
        feeds = []
        for slot in rng.sample(sorted(slots), rng.randint(1, len(slots))):
            rest = slots[slot][engine.length(slot) :][: rng.choice((1, 2, 5, 13))]
            wrong = [rng.randrange(256) for _ in range(rng.choice((0, 0, 3, 10)))]
            if rest:
                feeds.append((ScheduledSequence(slot, rest + wrong, len(rest + wrong)), len(rest)))
        if not feeds:
            continue
        outputs = engine.logits([feed for feed, _ in feeds])
        for feed, num_right in feeds:
            found[feed.slot] += list(outputs[:num_right])
            outputs = outputs[feed.num_outputs :]
            engine.truncate(feed.slot, len(found[feed.slot]))
    for slot in slots:
        engine.close(slot)
    return [torch.stack(found[slot]) for slot in slots]


def random_texts(rng: random.Random) -> list[list[int]]:
    return [[rng.randrange(256) for _ in range(rng.randint(20, 60))] for _ in range(3)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_schedule_gives_the_bits_of_one_token_a_pass_alone(
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
def test_speculative_decoding_writes_the_same_in_any_number_format(
    folder: str, dtype: str, make: Maker
) -> None:
    engine = make(load_source(ModelSource("tiny", folder, dtype=dtype)))
    draft = load_engine(ModelSource("draft", folder))  # float32, so it differs now and then
    prompt = [i * 29 % 256 for i in range(1, 20)]
    expected = decode_autoregressive(engine, prompt, 60)
    for lookahead in (1, 4, 9):
        assert decode_speculative(draft, engine, prompt, 60, lookahead) == expected


def test_without_it_bits_do_depend_on_the_schedule(tmp_path: Path) -> None:
    """So the tests above can fail."""
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


def test_a_reused_beginning_has_the_bits_of_a_computed_one(folder: str, make: Maker) -> None:
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


def test_the_probe_finds_passes_whose_shape_follows_what_is_in_them(folder: str) -> None:
    loaded = load_source(ModelSource("tiny", folder))
    passes = PaddedRunner(loaded.model, Buckets.fast(4, 192))
    with torch.inference_mode():
        assert not same_to_the_bit(passes, 256, num_places=8, num_sessions=2)


def test_a_model_that_fails_the_probe_is_refused(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "same_to_the_bit", lambda *_: False)
    with pytest.raises(InvalidInputError, match="numerics exact cannot be promised for tiny"):
        load_engine(ModelSource("tiny", folder), options=EXACT)


def test_experts_are_refused_for_their_share_of_a_pass_depends_on_its_tokens(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(**tiny.COMMON, **tiny.NO_SPECIAL, num_local_experts=4)
    folder = tiny.save(MixtralForCausalLM(config), tmp_path)
    with pytest.raises(InvalidInputError, match=r"exact cannot be promised.*an expert"):
        load_engine(ModelSource("experts", folder), options=EXACT)


def test_a_part_of_a_piece_has_the_outputs_that_fall_in_it() -> None:
    piece = Chunk("buffer", 10, [1, 2, 3, 4, 5], num_outputs=2)
    parts = [piece.part(0, 2), piece.part(2, 4), piece.part(4, 5)]
    assert [(part.start, part.tokens, part.num_outputs) for part in parts] == [
        (10, [1, 2], 0),
        (12, [3, 4], 1),
        (14, [5], 1),
    ]
