"""Finds and reads the files of a model's tokenizer. They are those that Transformers reads.

Chat templates in files of their own replace the ones in ``tokenizer_config.json``.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.utils.tqdm import disable_progress_bars

Json = dict[str, Any]

_TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS = "special_tokens_map.json"
_ADDED_TOKENS = "added_tokens.json"
_DEFAULT_TEMPLATE = "chat_template.jinja"
_PROCESSOR_TEMPLATE = "chat_template.json"
_NAMED_TEMPLATES = "additional_chat_templates"
_HUB_FILES = [
    _TOKENIZER,
    _CONFIG,
    _SPECIAL_TOKENS,
    _ADDED_TOKENS,
    _DEFAULT_TEMPLATE,
    _PROCESSOR_TEMPLATE,
    f"{_NAMED_TEMPLATES}/*.jinja",
]


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The contents of the files. An absent ``special_tokens_map`` or ``added_tokens`` is empty.

    ``tokenizer`` is the text of ``tokenizer.json``. ``templates`` are the Jinja sources of the chat
    templates by name.
    """

    tokenizer: str
    config: Json
    special_tokens_map: Json
    added_tokens: Json
    templates: dict[str, str]


def read_tokenizer_files(location: str) -> TokenizerFiles:
    """Read the files of a folder, or of a model on the hub.

    Raises:
        OSError: the folder or ``tokenizer.json`` is missing, or the hub cannot be reached.
        ValueError: a file is broken.
    """
    folder = _folder_of(location)
    config = _read_object(folder / _CONFIG)
    return TokenizerFiles(
        tokenizer=(folder / _TOKENIZER).read_text(encoding="utf-8"),
        config=config,
        special_tokens_map=_read_object(folder / _SPECIAL_TOKENS),
        added_tokens=_read_object(folder / _ADDED_TOKENS),
        templates=_templates(folder, config),
    )


def _folder_of(location: str) -> Path:
    folder = Path(location)
    if folder.is_dir():
        return folder
    if folder.is_absolute():
        raise FileNotFoundError(f"no such folder: {location}")
    disable_progress_bars()  # they make no sense in the log of a service
    return Path(huggingface_hub.snapshot_download(location, allow_patterns=_HUB_FILES))


def _read_object(path: Path) -> Json:
    """Return the JSON object of a file; it is empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return value


def _templates(folder: Path, config: Json) -> dict[str, str]:
    """Return the chat templates by name, with the precedence of Transformers."""
    in_files = {
        path.name.removesuffix(".jinja"): path.read_text(encoding="utf-8")
        for path in sorted((folder / _NAMED_TEMPLATES).glob("*.jinja"))
    }
    if (folder / _DEFAULT_TEMPLATE).is_file():
        default = (folder / _DEFAULT_TEMPLATE).read_text(encoding="utf-8")
        in_files = {"default": default} | in_files
    return (
        in_files
        or _named_templates(config.get("chat_template"), _CONFIG)
        # Transformers reads this file for the processors of multimodal models only.
        or _named_templates(
            _read_object(folder / _PROCESSOR_TEMPLATE).get("chat_template"), _PROCESSOR_TEMPLATE
        )
    )


def _named_templates(entry: object, file_name: str) -> dict[str, str]:
    """Return the templates of an entry: one template, or a list of named ones."""
    match entry:
        case None | "":
            return {}
        case str():
            return {"default": entry}
        case dict():
            named = entry
        case list() if all(isinstance(one, dict) for one in entry):
            named = {one.get("name"): one.get("template") for one in entry}
        case _:
            named = {"": None}
    if not all(isinstance(part, str) for item in named.items() for part in item):
        raise ValueError(f"{file_name}: chat_template is neither a text nor a list of named texts")
    return named
