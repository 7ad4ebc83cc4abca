"""What the configuration of a model says about the runners that can run it."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

_RECURRENT_LAYERS = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "rwkv", "mlstm")
_WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "window_size",
    "attention_window_size",
    "attention_chunk_size",
    "floor_scale",
)
"""Names of the positions from which attention sees or weighs other tokens."""


def reason_against_serving(model: PreTrainedModel) -> str | None:
    """Return why no runner can serve the model, as far as its class and configuration show it."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(model, "_is_stateful", False) or kinds.intersection(_RECURRENT_LAYERS):
        return "its recurrent state cannot return to an earlier position"
    return None


def says_encoder(model: PreTrainedModel) -> bool:
    """Whether the configuration calls the model no decoder. Some decoders are called so, too."""
    return getattr(model.config.get_text_config(), "is_decoder", True) is False


def reason_against_batching(model: PreTrainedModel, context: int) -> str | None:
    """Return why sequences of up to ``context`` tokens cannot share a forward pass.

    None: the configuration gives no reason.
    """
    if uses_sliding_window(model, context):
        return "some layers attend to a sliding window only"
    attention = model.config._attn_implementation
    return None if attention == "sdpa" else f"its attention is {attention}, not sdpa"


def reason_against_exact(model: PreTrainedModel) -> str | None:
    """Return why a token's bits depend on the rest of its batch, where a self-check may miss it."""
    settings = vars(model.config.get_text_config())
    nested = [vars(value) for value in settings.values() if isinstance(value, PreTrainedConfig)]
    for name, value in (pair for found in (settings, *nested) for pair in found.items()):
        if "expert" in name and isinstance(value, int) and value > 1:
            return "the number of tokens that an expert gets depends on the whole batch"
    return None


def uses_sliding_window(model: PreTrainedModel, context: int) -> bool:
    """Whether some layer attends to less than all earlier tokens of ``context`` tokens."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    is_whole = window is None or window >= context
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        return not (kinds == {"sliding_attention"} and window is not None and is_whole)
    return not is_whole and not getattr(config, "layer_types", None)


def window_lengths(model: PreTrainedModel) -> list[int]:
    """Return the lengths of text beyond which attention differs, in tokens."""
    config = model.config.get_text_config()
    found = [getattr(config, name, None) for name in _WINDOWS]
    return [value for value in found if isinstance(value, int) and value > 0]


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of weights that a forward pass reads.

    A pass reads only some rows of the embeddings, so they count only if the head shares them.
    """
    found = {id(weight): weight.nbytes for weight in model.parameters()}
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None or head.weight is not embeddings.weight:
        found.pop(id(embeddings.weight), None)
    return sum(found.values())
