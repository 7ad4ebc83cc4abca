"""Which tokens end an output, by all the files that may name one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from amusd.engine.loading.end_of_text import EndOfText, end_of_text
from amusd.engine.loading.model_files import ModelFiles, read_model_files
from amusd.fleet.vocabulary import Vocabulary
from amusd.protocol.errors import InvalidInputError
from tests import tiny

NOTHING_ENDS = "no token ends an output: only max_tokens and stop_token_ids do"


def found(
    config: object = None, generation: object = "no file", tokenizer: int | None = None
) -> EndOfText:
    files = ModelFiles(
        {"eos_token_id": config},
        None if generation == "no file" else {"eos_token_id": generation},
        Vocabulary(256, "x"),
        tokenizer,
    )
    return end_of_text(files, 256)


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "expected"),
    [
        (5, "no file", None, (5,)),
        ([5, 6, 5], "no file", None, (5, 6)),
        (5, 7, None, (7,)),
        (5, None, None, ()),  # the file is there and names none
        (None, 7, None, (7,)),
        (0, "no file", None, (0,)),
        (-1, "no file", None, ()),
        ([-1, 5], "no file", None, (5,)),
        (300, "no file", None, ()),
        ([256, 255], "no file", None, (255,)),
        (None, "no file", 9, (9,)),
        ([], "no file", 9, (9,)),
        (5, None, 9, (9,)),
        (5, "no file", 9, (5,)),
        (-1, "no file", 9, ()),  # a file that names one decides, also against all
        (None, "no file", 400, ()),
    ],
)
def test_the_files_decide_in_order(
    config: object, generation: object, tokenizer: int | None, expected: tuple[int, ...]
) -> None:
    assert found(config, generation, tokenizer).token_ids == expected


@pytest.mark.parametrize("value", ["5", 5.0, True, {"id": 5}, [[5]], [5, None]])
def test_an_id_that_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(InvalidInputError, match=r"eos_token_id of config\.json is .*: use a token"):
        found(value)


def test_what_is_not_plain_is_said_in_one_line_each() -> None:
    assert found(5).remarks == ()
    assert found().remarks == (NOTHING_ENDS,)
    assert found(5, 5, 5).remarks == ()
    ignored, nothing = found([-1, 300]).remarks
    assert "eos_token_id -1, 300 of config.json is ignored" in ignored
    assert nothing == NOTHING_ENDS
    [by_tokenizer] = found(tokenizer=9).remarks
    assert "the tokenizer's end-of-text token 9 ends an output" in by_tokenizer
    [another] = found(5, "no file", 9).remarks
    assert "the tokenizer's end-of-text token 9 ends no output" in another


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.save(tiny.build("llama"), path)
    return path


@pytest.mark.parametrize(
    ("config", "generation"),
    [
        ({"eos_token_id": 5}, None),
        ({"eos_token_id": [5, 6]}, None),
        ({"text_config": {"eos_token_id": 8}}, None),
        ({"eos_token_id": 5}, {}),
        ({"eos_token_id": 5}, {"eos_token_id": None}),
        ({"eos_token_id": 5}, {"eos_token_id": 7}),
        ({}, {"eos_token_id": [7, 8]}),
        ({}, None),
    ],
)
def test_configurations_are_read_as_transformers_reads_them(
    folder: Path, tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    if generation is None:
        theirs = GenerationConfig.from_pretrained(
            tmp_path, config_file_name="config.json", _from_model_config=True
        )
    else:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        theirs = GenerationConfig.from_pretrained(tmp_path)
    expected = theirs.eos_token_id
    ids = expected if isinstance(expected, list) else [] if expected is None else [expected]
    assert end_of_text(read_model_files(str(tmp_path)), 256).token_ids == tuple(ids)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("is_object", [False, True])
def test_the_tokenizers_token_is_found_in_each_of_its_files(
    folder: Path, tmp_path: Path, name: str, is_object: bool
) -> None:
    for file in ("config.json", "tokenizer.json"):
        shutil.copy(folder / file, tmp_path)
    token = tiny.byte_tokenizer().convert_ids_to_tokens(65)
    value = {"content": token, "special": True} if is_object else token
    (tmp_path / name).write_text(json.dumps({"eos_token": value}))
    assert read_model_files(str(tmp_path)).end_token_id == 65
