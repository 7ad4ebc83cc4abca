"""A tokenizer that does not belong to the verify model is refused, and the difference named."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from amusd.fleet.model_description import ModelDescription
from amusd.fleet.vocabulary import Vocabulary
from amusd.protocol.errors import InvalidInputError
from orchestrator.tokenizer_check import check_tokenizer


def description(vocabulary: Vocabulary, name: str = "models/tiny") -> ModelDescription:
    return ModelDescription(name, "cpu", "float32", 1, 64, vocabulary.size, vocabulary)


def tokenizer(folder: Path, tokens: dict[str, int]) -> str:
    Tokenizer(models.WordLevel(tokens, unk_token="a")).save(str(folder / "tokenizer.json"))
    return str(folder)


TOKENS = {"a": 0, "b": 1, "c": 2, "e": 4}  # with a hole


def test_the_models_own_tokenizer_passes_also_with_holes(tmp_path: Path) -> None:
    check_tokenizer(tokenizer(tmp_path, TOKENS), description(Vocabulary.of_ids(TOKENS)))


@pytest.mark.parametrize(
    ("tokens", "difference"),
    [
        ({"a": 0, "b": 1}, "the tokenizer has 2 tokens, the verify model 5"),
        ({"a": 0, "b": 2, "c": 1, "e": 4}, "both have 5 tokens; they differ in 1 of 1 blocks"),
        ({"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}, "both have 5 tokens"),
        ({"a": 0, "b": 1, "c": 2, "e": 3}, "the tokenizer has 4 tokens, the verify model 5"),
    ],
)
def test_another_tokenizer_is_refused_and_the_difference_named(
    tmp_path: Path, tokens: dict[str, int], difference: str
) -> None:
    name = tokenizer(tmp_path, tokens)
    with pytest.raises(InvalidInputError) as caught:
        check_tokenizer(name, description(Vocabulary.of_ids(TOKENS)))
    message = str(caught.value)
    assert f"{name!r} does not belong to the verify model 'models/tiny': {difference}" in message
    assert "--tokenizer" in message


def test_the_tokenizer_of_bytes_is_for_synthetic_models_only() -> None:
    numbers = Vocabulary.of([str(number) for number in range(300)])
    check_tokenizer("bytes", description(numbers, "synthetic:vocabulary=300"))
    with pytest.raises(InvalidInputError, match="leave --tokenizer out"):
        check_tokenizer("bytes", description(Vocabulary.of_ids(TOKENS)))


def test_a_synthetic_model_takes_any_tokenizer(tmp_path: Path) -> None:
    numbers = Vocabulary.of([str(number) for number in range(300)])
    check_tokenizer(tokenizer(tmp_path, TOKENS), description(numbers, "synthetic"))


def test_a_server_without_a_tokenizer_has_nothing_to_check() -> None:
    check_tokenizer("", description(Vocabulary.of_ids(TOKENS)))


@pytest.mark.parametrize("content", [None, "{", json.dumps({"version": "1.0"})])
def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InvalidInputError, match="cannot load the tokenizer of"):
        check_tokenizer(str(tmp_path), description(Vocabulary.of_ids(TOKENS)))
