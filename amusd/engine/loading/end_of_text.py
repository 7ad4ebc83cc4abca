"""Which tokens end an output: what the configuration names, as Transformers reads it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from amusd.engine.loading.model_files import CONFIG, GENERATION_CONFIG, ModelFiles
from amusd.protocol.errors import InvalidInputError

_KEY = "eos_token_id"
_ENDLESS = "no token ends an output: only max_tokens and stop_token_ids do"


@dataclass(frozen=True, slots=True)
class EndOfText:
    """The tokens that end an output, and remarks about them for the log, one line each."""

    token_ids: tuple[int, ...]
    remarks: tuple[str, ...] = ()


def end_of_text(files: ModelFiles, output_size: int) -> EndOfText:
    """Return the tokens that end an output of a model with ``output_size`` token ids.

    A generation_config.json decides, also if it names none; without the file, config.json does.
    Ids that the model cannot produce are ignored. If none is named, the tokenizer's end-of-text
    token ends an output.

    Raises:
        InvalidInputError: an id is not a number.
    """
    source = CONFIG if files.generation is None else GENERATION_CONFIG
    named = _named(source, files.config if files.generation is None else files.generation)
    if not named:
        return _by_tokenizer(files, output_size)
    known = tuple(token for token in dict.fromkeys(named) if 0 <= token < output_size)
    remarks = []
    if len(known) < len(set(named)):
        ignored = sorted(set(named) - set(known))
        remarks.append(
            f"{_KEY} {_listed(ignored)} of {source} is ignored: the model has ids 0 to "
            f"{output_size - 1}"
        )
    if not known:
        remarks.append(_ENDLESS)
    elif files.end_token_id is not None and files.end_token_id not in known:
        remarks.append(
            f"the tokenizer's end-of-text token {files.end_token_id} ends no output, because "
            f"{source} names {_listed(known)}: add it there if it should"
        )
    return EndOfText(known, tuple(remarks))


def _by_tokenizer(files: ModelFiles, output_size: int) -> EndOfText:
    """Return what ends an output if the configuration names no token."""
    token = files.end_token_id
    if token is None or token >= output_size:
        return EndOfText((), (_ENDLESS,))
    remark = (
        f"the tokenizer's end-of-text token {token} ends an output, because the configuration "
        f"names no {_KEY}"
    )
    return EndOfText((token,), (remark,))


def _named(source: str, config: Mapping[str, Any]) -> list[int]:
    """Return the ids that a configuration names."""
    value = config.get(_KEY)
    if value is None:
        nested = config.get("text_config")
        value = nested.get(_KEY) if isinstance(nested, dict) else None
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise InvalidInputError(
            f"{_KEY} of {source} is {value!r}: use a token id or a list of them"
        )
    return ids


def _listed(tokens: "tuple[int, ...] | list[int]") -> str:
    return ", ".join(str(token) for token in tokens)
