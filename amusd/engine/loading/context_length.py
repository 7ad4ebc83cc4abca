"""How many tokens a model takes, by its configuration, position tables and tokenizer."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

log = logging.getLogger(__name__)

_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
    "max_seq_length",
    "n_ctx",
    "model_max_length",
)
"""What configurations call the context length, the name of Transformers first."""

_POSITION_TABLES = ("embed_positions", "wpe", "position_embeddings")
_NO_LIMIT = 1 << 20
_RECOMPUTES_AT_SWITCH = ("phi3", "phimoe", "phi4_multimodal")
"""Types whose ``generate`` computes the whole text again when the rotary factors change."""


def context_length(model: PreTrainedModel, location: str) -> int:
    """Return the most tokens of a sequence.

    The configuration decides, or else the tokenizer, within the position table of the model. YaRN
    extends what the configuration names.

    Args:
        model: the loaded model.
        location: its folder or hub id.
    """
    config: Any = model.config.get_text_config()
    tables = list(_table_lengths(model))
    named = _named_length(config) or _named_length(model.config)
    if named is not None:
        return min([_within_rope(config, named), *tables])
    limits = [*tables, *_tokenizer_limit(location)]
    if not limits:
        log.warning(
            "the configuration of %s names no context length, so sessions may have up to %d "
            "tokens: set --max-context to the length that the model was trained for",
            location,
            _NO_LIMIT,
        )
    return min([*limits, _NO_LIMIT])


def rope_switch(model: PreTrainedModel, context: int) -> int | None:
    """Return the length beyond which the rotary angles of all tokens change; None: they do not.

    LongRoPE has short factors for texts up to this length, and long factors for longer texts.

    Args:
        model: the loaded model.
        context: the longest text that is served.
    """
    switch = min(_longrope_lengths(model.config.get_text_config()), default=context)
    return switch if switch < context else None


def _named_length(config: Any) -> int | None:
    """Return the context length that a configuration names; None if it names none."""
    for name in _NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _tokenizer_limit(location: str) -> Iterator[int]:
    """Yield the length that the configuration of the tokenizer names, if it names one."""
    path = cached_file(
        location, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False
    )
    if path is None:
        return
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        return
    limit = found.get("model_max_length") if isinstance(found, dict) else None
    # Transformers writes 10 ** 30 for no limit, as a float or as an integer.
    if isinstance(limit, int | float) and 1 <= limit < _NO_LIMIT:
        yield int(limit)


def _within_rope(config: Any, named: int) -> int:
    """Return the context length with the rotary embeddings of the model taken into account."""
    extended = max([named, *_yarn_lengths(config)])
    switches = list(_longrope_lengths(config))
    if not switches or min(switches) >= extended or config.model_type in _RECOMPUTES_AT_SWITCH:
        return extended
    log.warning(
        "the rotary factors (longrope) change beyond %d tokens, where Transformers mixes them in "
        "its cache for models of type %s: sessions have up to %d tokens",
        min(switches),
        config.model_type,
        min(switches),
    )
    return min(switches)


def _yarn_lengths(config: Any) -> Iterator[int]:
    """Yield the extended context lengths of YaRN."""
    for parameters in _rope_parameters(config):
        original = parameters.get("original_max_position_embeddings")
        factor = parameters.get("factor")
        if parameters.get("rope_type") == "yarn" and original and factor:
            yield int(original * factor)


def _longrope_lengths(config: Any) -> Iterator[int]:
    """Yield the lengths beyond which LongRoPE has other factors."""
    for parameters in _rope_parameters(config):
        original = parameters.get("original_max_position_embeddings")
        if parameters.get("rope_type") == "longrope" and original:
            yield int(original)


def _rope_parameters(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the parameters of each kind of rotary embedding. Layer types may have their own."""
    found = getattr(config, "rope_parameters", None)
    if not isinstance(found, Mapping):
        return
    yield found
    yield from (own for own in found.values() if isinstance(own, Mapping))


def _table_lengths(model: PreTrainedModel) -> Iterator[int]:
    """Yield the number of positions of each learned position table of a text model."""
    if model.config.get_text_config() is not model.config:
        return  # the tables of other parts, such as an image encoder, limit no text
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _POSITION_TABLES and isinstance(module, nn.Embedding):
            yield module.num_embeddings - int(getattr(module, "offset", 0))
