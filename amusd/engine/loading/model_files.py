"""Reads the small files of a model folder before its weights, and refuses broken ones."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.utils.hub import cached_file

from amusd.fleet.vocabulary import Vocabulary

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
_TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What the files beside the weights say.

    ``generation`` is None without a generation_config.json. ``end_token_id`` is the id of the
    tokenizer's end-of-text token; None: the tokenizer names none.
    """

    config: Mapping[str, Any]
    generation: Mapping[str, Any] | None
    vocabulary: Vocabulary
    end_token_id: int | None


def read_model_files(location: str, needs_tokenizer_json: bool = True) -> ModelFiles:
    """Read the files beside the weights of a folder or hub id.

    Args:
        location: the folder or hub id.
        needs_tokenizer_json: refuse a model without tokenizer.json, which an orchestrator needs.
            Without it, any tokenizer that Transformers can load is enough.

    Raises:
        OSError: a file is missing, or cannot be read.
        ValueError: a file is broken. The message says which one and why.
    """
    config = _read_object(location, CONFIG)
    if config is None:
        raise FileNotFoundError(f"there is no {CONFIG}")
    ids = _tokenizer_ids(location, needs_tokenizer_json)
    try:
        vocabulary = Vocabulary.of_ids(ids)
    except ValueError as error:
        raise ValueError(f"{TOKENIZER}: {error}") from error
    return ModelFiles(
        config,
        _read_object(location, GENERATION_CONFIG),
        vocabulary,
        ids.get(_end_token(location) or ""),
    )


def _tokenizer_ids(location: str, needs_tokenizer_json: bool) -> dict[str, int]:
    """Return the id of each token."""
    text = _read(location, TOKENIZER)
    if text is not None:
        try:
            ids: dict[str, int] = Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
        except Exception as error:  # the library raises no narrower type
            raise ValueError(f"{TOKENIZER} cannot be used: {error}") from error
        return ids
    if needs_tokenizer_json:
        raise FileNotFoundError(
            f"there is no {TOKENIZER}, which orchestrators need: write it with save_pretrained() "
            "of the model's AutoTokenizer"
        )
    return dict(AutoTokenizer.from_pretrained(location).get_vocab())


def _end_token(location: str) -> str | None:
    """Return the end-of-text token that the tokenizer's configuration names."""
    for name in _TOKENIZER_CONFIGS:
        value = (_read_object(location, name) or {}).get("eos_token")
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            return value
    return None


def _read_object(location: str, name: str) -> dict[str, Any] | None:
    """Return the content of a JSON file; None if there is no such file."""
    text = _read(location, name)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} holds a {type(found).__name__}, not an object")
    return found


def _read(location: str, name: str) -> str | None:
    """Return the text of a file; None if there is no such file."""
    path = cached_file(location, name, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error}") from error
