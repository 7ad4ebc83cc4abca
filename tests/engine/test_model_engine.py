"""The engine of a Transformers model: batches, rollbacks, and models that cannot be served."""

from pathlib import Path

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from amusd.engine.interface import ScheduledSequence
from amusd.engine.kv.sequence_cache import CacheLayer, SequenceCache
from amusd.engine.loading.model_source import LoadedModel, ModelSource
from amusd.engine.model_engine import ModelEngine, load_engine, serve
from amusd.engine.reference import decode_autoregressive, decode_speculative
from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from amusd.protocol.errors import InvalidInputError
from amusd.sampling.parameters import LogprobsOptions, SequenceSampling
from tests.tiny import VOCABULARY, build, perturbed, save

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(build("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engine(folder: str) -> ModelEngine:
    return load_engine(ModelSource("tiny", folder))


def run(engine: ModelEngine, slot: int, tokens: list[int]) -> list[int]:
    found: list[int] = engine.run([ScheduledSequence(slot, tokens, len(tokens))])[0]
    return found


def test_the_description_names_the_properties_of_the_model(engine: ModelEngine) -> None:
    found = engine.description
    assert (found.name, found.device, found.dtype) == ("tiny", "cpu", "float32")
    assert found.context_length == 400
    assert found.output_size == found.vocabulary.size == VOCABULARY
    assert found.num_parameters > 0


def test_a_chunked_prefill_gives_the_tokens_of_a_whole_one(engine: ModelEngine) -> None:
    whole, chunked = engine.open(50), engine.open(50)
    expected = run(engine, whole, PROMPT)
    found = [*run(engine, chunked, PROMPT[:3]), *run(engine, chunked, PROMPT[3:])]
    engine.close(whole)
    engine.close(chunked)
    assert found == expected


def test_after_a_rollback_dropped_tokens_have_no_effect(engine: ModelEngine) -> None:
    used, fresh = engine.open(50), engine.open(50)
    run(engine, used, [*PROMPT, 7, 7, 7, 7])
    engine.truncate(used, len(PROMPT))
    run(engine, fresh, PROMPT)
    assert engine.length(used) == engine.length(fresh) == len(PROMPT)
    assert run(engine, used, [8, 9]) == run(engine, fresh, [8, 9])
    engine.close(used)
    engine.close(fresh)


def test_sequences_do_not_see_one_another(engine: ModelEngine) -> None:
    expected = decode_autoregressive(engine, PROMPT, 20)
    other = engine.open(60)
    run(engine, other, list(range(50)))
    assert decode_autoregressive(engine, PROMPT, 20) == expected
    engine.close(other)
    assert engine.num_open == 0


def test_a_batch_returns_as_many_tokens_as_it_asks_for(engine: ModelEngine) -> None:
    slot = engine.open(20)
    assert engine.run([ScheduledSequence(slot, PROMPT, 0)]) == [[]]
    assert len(engine.run([ScheduledSequence(slot, PROMPT, 3)])[0]) == 3
    engine.close(slot)


def test_a_sequence_longer_than_the_context_is_refused(engine: ModelEngine) -> None:
    with pytest.raises(InvalidInputError, match="of 400"):
        engine.open(401)


def buffer_of(cache: SequenceCache) -> torch.Tensor:
    layer = cache.layers[0]
    assert isinstance(layer, CacheLayer)
    assert layer.keys is not None
    return layer.keys


def test_a_rollback_moves_and_copies_nothing() -> None:
    cache = SequenceCache(num_layers=1, capacity=100)
    states = torch.randn(1, 2, 40, 8)
    cache.update(states, states, 0)
    before = buffer_of(cache).data_ptr()
    cache.truncate(10)
    keys, _ = cache.update(states[:, :, :5], states[:, :, :5], 0)
    assert buffer_of(cache).data_ptr() == before
    assert keys.shape[2] == cache.length == 15
    assert torch.equal(keys[:, :, 10:], states[:, :, :5])


def test_a_cache_grows_with_its_tokens_and_keeps_them() -> None:
    cache = SequenceCache(num_layers=1, capacity=1000)
    states = torch.randn(1, 2, 1000, 8)
    for start in range(0, 1000, 100):
        chunk = states[:, :, start : start + 100]
        keys, values = cache.update(chunk, chunk, 0)
        assert torch.equal(keys, states[:, :, : start + 100])
        assert torch.equal(values, keys)
    assert buffer_of(cache).shape[2] == 1000


def test_speculative_reference_decoding_writes_the_autoregressive_tokens(folder: str) -> None:
    verify = load_engine(ModelSource("verify", folder))
    draft = serve(LoadedModel(perturbed(build("llama"), 0.05), verify.description))
    expected = decode_autoregressive(verify, PROMPT, 40)
    for lookahead in (1, 3, 7):
        assert decode_speculative(draft, verify, PROMPT, 40, lookahead) == expected
    assert draft.num_open == verify.num_open == 0


def test_reference_decoding_works_with_synthetic_models() -> None:
    verify = SyntheticEngine(SyntheticModel())
    draft = SyntheticEngine(SyntheticModel(agreement=0.6))
    expected = decode_autoregressive(verify, PROMPT, 50)
    assert decode_speculative(draft, verify, PROMPT, 50, lookahead=4) == expected


def test_a_draft_never_writes_ids_outside_its_tokenizer(tmp_path: Path) -> None:
    model = build("llama")
    model.resize_token_embeddings(VOCABULARY + 64, mean_resizing=False)  # a padded head
    head = model.lm_head.weight
    with torch.no_grad():
        head[VOCABULARY:] = 3 * head[:64]  # likelier than the ids of the tokenizer
    folder = save(model, tmp_path)
    padded = load_engine(ModelSource("padded", folder))
    known = load_engine(ModelSource("padded", folder), known_tokens_only=True)
    prompts = [[number, number + 1] for number in range(60)]
    assert max(max(decode_autoregressive(padded, prompt, 1)) for prompt in prompts) >= VOCABULARY
    assert max(max(decode_autoregressive(known, prompt, 4)) for prompt in prompts) < VOCABULARY


def test_a_model_that_cannot_be_rolled_back_is_refused(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8)
    folder = save(MambaForCausalLM(config), tmp_path)
    with pytest.raises(InvalidInputError, match="cannot be served"):
        load_engine(ModelSource("recurrent", folder))


def test_an_unknown_dtype_is_refused(folder: str) -> None:
    with pytest.raises(InvalidInputError, match="use auto, float32"):
        load_engine(ModelSource("tiny", folder, dtype="int7"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_served(folder: str, dtype: str) -> None:
    engine = load_engine(ModelSource("tiny", folder, dtype=dtype))
    assert engine.description.dtype == dtype
    assert len(decode_autoregressive(engine, PROMPT, 5)) == 5


@pytest.mark.parametrize("kind", ["tiny", "synthetic"])
def test_log_probabilities_stay_until_the_next_batch_of_their_sequence(
    engine: ModelEngine, kind: str
) -> None:
    asked = SequenceSampling(num_prompt_tokens=2, logprobs=LogprobsOptions(2))
    used = engine if kind == "tiny" else SyntheticEngine(SyntheticModel(batch=2))
    first, other = used.open(20, asked), used.open(20, asked)
    both = [ScheduledSequence(slot, [3, 1], 1) for slot in (first, other)]
    [[token], _] = used.run(both)
    [expected] = used.logprobs(first)
    assert expected.token == token == expected.top[0][0]
    used.run([ScheduledSequence(other, [4, 1], 2)])
    assert list(used.logprobs(first)) == [expected]
    assert len(used.logprobs(other)) == 2
    used.run([ScheduledSequence(first, [4], 1)])
    assert list(used.logprobs(first)) != [expected]
    for slot in (first, other):
        used.close(slot)
