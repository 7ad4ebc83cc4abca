"""Names the special tokens of a tokenizer, by the rules of Transformers.

``special_tokens_map.json`` and ``added_tokens.json`` count only if ``tokenizer_config.json`` has no
``added_tokens_decoder``. Then the former overrides ``tokenizer_config.json``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer

from amusd.tokenizer.tokenizer_files import TokenizerFiles

_STANDARD_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_EXTRA = "extra_special_tokens"
_ADDITIONAL = "additional_special_tokens"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Special tokens by their names in chat templates, extra ones without a name, added tokens.

    ``added`` are the tokens with flags of their own, in the order of their ids.
    """

    named: dict[str, AddedToken]
    extra: tuple[AddedToken, ...]
    added: tuple[AddedToken, ...]

    def texts(self) -> dict[str, str]:
        """Return the text of each named token."""
        return {name: str(token.content) for name, token in self.named.items()}


def special_tokens_of(files: TokenizerFiles, tokenizer: Tokenizer) -> SpecialTokens:
    """Return the special tokens that the files of ``tokenizer`` name.

    Raises:
        ValueError: a token is neither a text nor an object with a content.
    """
    config = files.config
    is_legacy = "added_tokens_decoder" not in config
    overrides = files.special_tokens_map if is_legacy else {}
    values = config | overrides
    if tokenizer.padding and "pad_token" not in values:
        values["pad_token"] = tokenizer.padding["pad_token"]
    named = _named_tokens(values, config, overrides)
    extra = _extra_tokens(config, overrides)
    if is_legacy:
        special = {token.content for token in (*named.values(), *extra)}
        present = tokenizer.get_added_tokens_decoder()
        known = {token.content for token in present.values()}
        absent = {
            text: token_id
            for text, token_id in files.added_tokens.items()
            if text not in known and token_id not in present
        }
        added = _added_tokens(absent, special)
    else:
        decoder = config["added_tokens_decoder"] or {}
        added = [_token(decoder[key], f"token {key}") for key in sorted(decoder, key=int)]
    return SpecialTokens(named, extra, tuple(added))


def add_tokens(tokenizer: Tokenizer, tokens: SpecialTokens) -> None:
    """Add the tokens that ``tokenizer`` does not have yet, or has with other flags."""
    present = tokenizer.get_added_tokens_decoder().values()
    same = {repr(token) for token in present}
    missing = [token for token in tokens.added if repr(token) not in same]
    names = {token.content for token in tokens.named.values()}
    known = {token.content for token in (*present, *missing)}
    for token in (*tokens.named.values(), *tokens.extra):
        if token.content not in known:
            known.add(token.content)
            missing.append(token)
    for token in missing:
        token.special = token.special or token.content in names
    if missing:
        tokenizer.add_tokens(missing)


def _named_tokens(
    values: Mapping[str, Any], config: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, AddedToken]:
    """Return the standard tokens, and those that a model names: keys that end in ``_token``."""
    named = {name: values[name] for name in _STANDARD_NAMES if values.get(name) is not None}
    for name, value in values.items():
        # Unlike a standard token, a text in the config comes before an override.
        own = config[name] if isinstance(config.get(name), str) else value
        is_token = name.endswith("_token") and isinstance(own, (str, dict))
        if is_token and name not in _STANDARD_NAMES:
            named[name] = own
    for entry in (config.get(_EXTRA) or config.get(_ADDITIONAL), overrides.get(_EXTRA)):
        if isinstance(entry, dict):
            named |= entry
    return {name: _token(value, name) for name, value in named.items() if value is not None}


def _extra_tokens(
    config: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[AddedToken, ...]:
    """Return the special tokens without a name."""
    extra = config.get(_EXTRA) or config.get(_ADDITIONAL)
    if not isinstance(extra, list):
        extra = []
    more = overrides.get(_EXTRA)
    if isinstance(more, list):
        extra = extra + more
    return tuple(_token(value, _EXTRA) for value in extra or overrides.get(_ADDITIONAL) or [])


def _token(value: object, name: str) -> AddedToken:
    """Return the token that a file describes by its text, or by an object with its flags."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {flag: bool(value[flag]) for flag in _FLAGS if flag in value}
        return AddedToken(value["content"], **flags)
    raise ValueError(f"{name}: a token is a text, or an object with a content, not {value!r:.80}")


def _added_tokens(added_tokens: Mapping[str, Any], special: set[str]) -> list[AddedToken]:
    """Return the tokens of ``added_tokens.json`` in the order of their ids."""
    if not all(isinstance(token_id, int) for token_id in added_tokens.values()):
        raise ValueError("added_tokens.json: the id of a token is no number")
    return [
        AddedToken(text, normalized=text not in special, special=text in special)
        for text in sorted(added_tokens, key=lambda text: int(added_tokens[text]))
    ]
