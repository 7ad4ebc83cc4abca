"""Generation settings of a model: which of them change greedy output but are not applied."""

from typing import Any

from transformers import GenerationConfig, PreTrainedModel

_NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "forced_decoder_ids": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1,
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": 0,
    "dola_layers": None,
    "force_words_ids": None,
    "constraints": None,
    "stop_strings": None,
    "token_healing": False,
    "watermarking_config": None,
}
"""Settings that change greedy output, with the value that changes nothing."""

_MAX_VALUE_CHARACTERS = 40


def unapplied_settings(config: GenerationConfig | None) -> dict[str, Any]:
    """Return the settings of ``config`` that would change greedy output, by name."""
    found = {name: getattr(config, name, None) for name in _NEUTRAL}
    return {name: value for name, value in found.items() if not _is_neutral(name, value)}


def explain_unapplied(config: GenerationConfig | None) -> str | None:
    """Say in one line which settings of ``config`` are not applied; None: there are none."""
    found = unapplied_settings(config)
    if not found:
        return None
    settings = ", ".join(f"{name}={_short(value)}" for name, value in found.items())
    return f"generation settings of the model are not applied: {settings}; output is plain greedy"


def use_plain_greedy(model: PreTrainedModel, eos_token_ids: tuple[int, ...]) -> None:
    """Let ``generate`` of ``model`` decode as the services do: plainly, up to ``eos_token_ids``."""
    before: Any = model.generation_config
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=before.bos_token_id,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=before.pad_token_id or 0,
    )


def _is_neutral(name: str, value: Any) -> bool:
    if value is None or value == _NEUTRAL[name]:
        return True
    return isinstance(value, list | dict | bool) and not value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _MAX_VALUE_CHARACTERS else text[:_MAX_VALUE_CHARACTERS] + "..."
