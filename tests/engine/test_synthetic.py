"""The synthetic model follows its settings, and its engine behaves like any engine."""

import random
from time import perf_counter as time_now

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amusd.engine.interface import ScheduledSequence
from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from amusd.protocol.errors import InvalidInputError, LimitExceededError

PROMPT = [1, 2, 3]


@pytest.fixture
def engine() -> SyntheticEngine:
    return SyntheticEngine(SyntheticModel(vocabulary=50, seed=3))


def written(model: SyntheticModel, prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(model.next_token(tokens))
    return tokens[len(prompt) :]


def contexts(num_contexts: int) -> list[list[int]]:
    chance = random.Random(7)
    return [
        [chance.randrange(50) for _ in range(chance.randint(1, 30))] for _ in range(num_contexts)
    ]


# The model by name


def test_the_name_alone_is_the_default_model() -> None:
    assert SyntheticModel.parse("synthetic") == SyntheticModel()
    assert SyntheticModel.parse("synthetic:") == SyntheticModel()


def test_every_setting_can_be_in_the_name() -> None:
    name = (
        "synthetic:vocabulary=100,seed=3,agreement=0.75,pass_ms=20,row_ms=0.5,context=64,batch=4,"
        "period=9"
    )
    assert SyntheticModel.parse(name) == SyntheticModel(100, 3, 0.75, 20.0, 0.5, 64, 4, 9)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("synthetic:speed=3", "unknown setting 'speed'.*use vocabulary, seed"),
        ("synthetic:seed", "setting seed='' is not a number"),
        ("synthetic:seed=x", "setting seed='x' is not a number"),
        ("synthetic:vocabulary=1.5", "setting vocabulary='1.5' is not a number"),
        ("synthetic:agreement=1.01", "agreement is 1.01: use 0 to 1"),
        ("synthetic:agreement=-0.1", "agreement is -0.1: use 0 to 1"),
        ("synthetic:spread=1.5", "spread is 1.5: use 0 to 1"),
        ("synthetic:spread=nan", "spread is nan: use 0 to 1"),
        ("synthetic:agreement=nan", "agreement is nan: use 0 to 1"),
        ("synthetic:vocabulary=1", "2 or more"),
        ("synthetic:context=1", "2 or more"),
        ("synthetic:batch=0", "batch 1 or more"),
        ("synthetic:pass_ms=-1", "pass_ms and row_ms need 0 or more"),
        ("synthetic:row_ms=-1", "pass_ms and row_ms need 0 or more"),
        ("synthetic:pass_ms=nan", "pass_ms and row_ms need 0 or more"),
        ("synthetic:row_ms=inf", "pass_ms and row_ms need 0 or more"),
        ("synthetic:period=-1", "period and memory need 0 or more"),
    ],
)
def test_a_wrong_name_is_refused_with_advice(name: str, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        SyntheticModel.parse(name)


# The tokens that it writes


def test_with_a_period_the_text_repeats_and_a_draft_agrees_as_often_as_set() -> None:
    text = written(SyntheticModel(period=20), PROMPT, 80)
    assert text == text[:20] * 4
    drafted = written(SyntheticModel(period=20, agreement=0.5), PROMPT, 20)
    assert 4 <= sum(one == other for one, other in zip(text, drafted, strict=False)) <= 16


def test_the_same_context_gives_the_same_token() -> None:
    assert written(SyntheticModel(seed=5), PROMPT, 50) == written(
        SyntheticModel(seed=5), PROMPT, 50
    )


def test_another_seed_writes_another_text() -> None:
    assert written(SyntheticModel(seed=5), PROMPT, 50) != written(
        SyntheticModel(seed=6), PROMPT, 50
    )


@pytest.mark.parametrize("other", [[1, 2, 4], [1, 5, 3]])
def test_after_another_token_the_text_continues_differently(other: list[int]) -> None:
    model = SyntheticModel()
    assert written(model, PROMPT, 20) != written(model, other, 20)


def test_every_token_is_within_the_vocabulary() -> None:
    model = SyntheticModel(vocabulary=3, agreement=0.5)
    assert set(written(model, PROMPT, 200)) == {0, 1, 2}


@pytest.mark.parametrize("agreement", [0.0, 0.25, 0.5, 0.75, 0.9, 1.0])
def test_a_draft_agrees_as_often_as_set(agreement: float) -> None:
    verify, draft = SyntheticModel(vocabulary=50), SyntheticModel(50, agreement=agreement)
    agreed = [verify.next_token(tokens) == draft.next_token(tokens) for tokens in contexts(5000)]
    assert sum(agreed) / len(agreed) == pytest.approx(agreement, abs=0.02)


# The engine


def test_an_engine_returns_the_tokens_of_its_model(engine: SyntheticEngine) -> None:
    model = SyntheticModel(vocabulary=50, seed=3)
    [outputs] = engine.run([ScheduledSequence(engine.open(10), [1, 2, 3, 4], num_outputs=2)])
    assert outputs == [model.next_token([1, 2, 3]), model.next_token([1, 2, 3, 4])]


def test_prefill_without_outputs_returns_no_tokens(engine: SyntheticEngine) -> None:
    slot = engine.open(10)
    assert engine.run([ScheduledSequence(slot, PROMPT, num_outputs=0)]) == [[]]
    assert engine.length(slot) == 3


@given(st.lists(st.integers(0, 49), min_size=1, max_size=20), st.data())
@settings(deadline=None)
def test_a_chunked_prefill_gives_the_token_of_a_whole_one(
    tokens: list[int], data: st.DataObject
) -> None:
    engine = SyntheticEngine(SyntheticModel(vocabulary=50))
    whole, chunked = engine.open(20), engine.open(20)
    cut = data.draw(st.integers(0, len(tokens) - 1))
    engine.run([ScheduledSequence(chunked, tokens[:cut], 0)])
    found = engine.run([ScheduledSequence(chunked, tokens[cut:], 1)])
    assert found == engine.run([ScheduledSequence(whole, tokens, 1)])


def test_sequences_do_not_affect_one_another(engine: SyntheticEngine) -> None:
    first, second, single = engine.open(10), engine.open(10), engine.open(10)
    batched = engine.run(
        [ScheduledSequence(first, [1, 2], 1), ScheduledSequence(second, [3, 4], 1)]
    )
    assert batched[0] == engine.run([ScheduledSequence(single, [1, 2], 1)])[0]
    engine.close(second)
    assert engine.run([ScheduledSequence(first, [5], 1)]) == engine.run(
        [ScheduledSequence(single, [5], 1)]
    )


def test_after_a_truncation_dropped_tokens_have_no_effect(
    engine: SyntheticEngine,
) -> None:
    rolled_back, fresh = engine.open(10), engine.open(10)
    engine.run([ScheduledSequence(rolled_back, [1, 2, 8, 9], 1)])
    engine.truncate(rolled_back, 2)
    assert engine.length(rolled_back) == 2
    after = engine.run([ScheduledSequence(rolled_back, [3], 1)])
    assert after == engine.run([ScheduledSequence(fresh, [1, 2, 3], 1)])


def test_a_sequence_takes_no_more_than_its_capacity(engine: SyntheticEngine) -> None:
    slot = engine.open(3)
    engine.run([ScheduledSequence(slot, PROMPT, 1)])
    with pytest.raises(LimitExceededError, match="is full"):
        engine.run([ScheduledSequence(slot, [4], 1)])


def test_a_sequence_is_no_longer_than_the_context() -> None:
    engine = SyntheticEngine(SyntheticModel(context=16))
    engine.open(16)
    with pytest.raises(InvalidInputError, match=r"17 tokens do not fit the context .* of 16"):
        engine.open(17)


def test_closed_sequences_are_not_open(engine: SyntheticEngine) -> None:
    slots = [engine.open(10) for _ in range(3)]
    assert engine.num_open == 3
    for slot in slots:
        engine.close(slot)
    assert engine.num_open == 0


def test_a_pass_takes_its_time_and_more_for_each_further_token() -> None:
    engine = SyntheticEngine(SyntheticModel(pass_ms=2.0, row_ms=1.0))
    started = time_now()
    engine.run(
        [
            ScheduledSequence(engine.open(10), [1, 2, 3], 1),
            ScheduledSequence(engine.open(10), [4], 1),
        ]
    )
    assert time_now() - started >= 0.005


@pytest.mark.parametrize(("vocabulary", "tokenizer"), [(255, ""), (256, "bytes"), (300, "bytes")])
def test_its_tokens_are_bytes_if_its_vocabulary_has_all_bytes(
    vocabulary: int, tokenizer: str
) -> None:
    description = SyntheticEngine(SyntheticModel(vocabulary=vocabulary)).description
    assert description.tokenizer == tokenizer
    assert description.output_size == description.vocabulary.size == vocabulary


def test_its_description_names_the_runner(engine: SyntheticEngine) -> None:
    assert engine.description.runner == "synthetic"
    assert "no weights" in engine.description.runner_reason


def test_models_of_one_vocabulary_size_fit_each_other() -> None:
    first, second = (SyntheticEngine(SyntheticModel(seed=seed)).description for seed in (1, 2))
    assert first.vocabulary == second.vocabulary


# Probabilities


def test_without_alternatives_and_spread_it_knows_no_probabilities(engine: SyntheticEngine) -> None:
    slot = engine.open(10)
    engine.run([ScheduledSequence(slot, PROMPT, 1)])
    assert engine.probabilities(slot) == ()


@pytest.mark.parametrize("alternatives", [0, 3])
def test_with_a_spread_each_context_has_a_probability_of_its_own(alternatives: int) -> None:
    draft = SyntheticModel(50, 3, 0.7, spread=0.5, alternatives=alternatives)
    verify, engine = SyntheticModel(50, 3), SyntheticEngine(draft)
    found: dict[float, list[bool]] = {}
    for context in contexts(3000):
        slot = engine.open(100)
        [[token]] = engine.run([ScheduledSequence(slot, context, 1)])
        probability, *others = engine.probabilities(slot)
        assert len(others) == alternatives
        found.setdefault(round(probability, 6), []).append(token == verify.next_token(context))
        engine.close(slot)
    assert sorted(found) == pytest.approx([0.35, 0.85])
    for probability, outcomes in found.items():
        assert sum(outcomes) / len(outcomes) == pytest.approx(probability, abs=0.05)
    outcomes = [one for some in found.values() for one in some]
    assert sum(outcomes) / len(outcomes) == pytest.approx(0.7, abs=0.03)


def test_without_a_spread_its_tokens_are_those_of_its_agreement() -> None:
    some = contexts(200)
    plain, spread = SyntheticModel(50, 3, 0.7), SyntheticModel(50, 3, 0.7, spread=0.5)
    assert [plain.next_token(one) for one in some] != [spread.next_token(one) for one in some]
    assert plain.fingerprint != spread.fingerprint
