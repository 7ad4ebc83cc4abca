"""Engines of real models keep to constraints; a draft does without one that it cannot use."""

from pathlib import Path

import pytest

from amusd.engine.interface import EngineOptions, ScheduledSequence
from amusd.engine.loading.model_source import ModelSource
from amusd.engine.model_engine import ModelEngine, load_engine
from amusd.protocol.errors import InvalidInputError
from amusd.sampling.parameters import (
    Constraint,
    ConstraintKind,
    SamplingParameters,
    SequenceSampling,
)
from tests.tiny import build, byte_tokenizer, save

END = 0
PROMPT = [70, 71, 72]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    model = build("llama")
    assert model.generation_config is not None
    model.generation_config.eos_token_id = END
    save(model, path)
    return path


def _engine(folder: Path, is_draft: bool) -> ModelEngine:
    source = ModelSource("tiny", str(folder))
    return load_engine(source, is_draft, EngineOptions(is_draft=is_draft))


@pytest.fixture(scope="module")
def engine(folder: Path) -> ModelEngine:
    return _engine(folder, is_draft=False)


def _sampling(form: str, temperature: float = 0.0) -> SequenceSampling:
    constraint = Constraint(ConstraintKind.REGEX, form)
    parameters = SamplingParameters(temperature=temperature, seed=7, constraint=constraint)
    return SequenceSampling(parameters, num_prompt_tokens=len(PROMPT))


def _output(engine: ModelEngine, sampling: SequenceSampling) -> list[int]:
    """Return the output up to its end, decoded token by token."""
    slot, tokens = engine.open(60, sampling), list(PROMPT)
    try:
        while tokens[-1] != END:
            chunk = tokens[engine.length(slot) :]
            tokens += engine.run([ScheduledSequence(slot, chunk, 1)])[0]
    finally:
        engine.close(slot)
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_output_matches_its_constraint_and_ends_behind_it(
    engine: ModelEngine, temperature: float
) -> None:
    sampling = _sampling("[a-c]{3}-(xy|z)", temperature)
    kept = engine.prepare(sampling)
    output = _output(engine, sampling)
    text = str(byte_tokenizer().decode(output[:-1]))
    assert text[:3].strip("abc") == ""
    assert text[3:] in ("-xy", "-z")
    assert kept is not None


def test_a_pass_over_proposals_gives_the_tokens_of_decoding_one_by_one(
    engine: ModelEngine,
) -> None:
    sampling = _sampling("[a-z]{5}", temperature=1.0)
    output = _output(engine, sampling)
    slot = engine.open(60, sampling)
    proposed = [*output[:3], output[3] + 1, END]
    [outputs] = engine.run([ScheduledSequence(slot, [*PROMPT, *proposed], len(proposed) + 1)])
    engine.truncate(slot, len(PROMPT) + 3)
    [rest] = engine.run([ScheduledSequence(slot, output[3:5], 2)])
    engine.close(slot)
    assert outputs[:4] == output[:4]
    assert rest == output[4:]


def test_a_constraint_that_cannot_be_used_is_refused_by_a_verify_model_only(
    engine: ModelEngine, folder: Path
) -> None:
    broken = _sampling("(a")
    for refuse in (engine.prepare, lambda sampling: engine.open(9, sampling)):
        with pytest.raises(InvalidInputError, match="unclosed group"):
            refuse(broken)
    draft = _engine(folder, is_draft=True)
    assert draft.prepare(broken) is None
    draft.close(draft.open(9, broken))
    assert draft.num_open == 0
    assert engine.num_open == 0
