"""What the configuration of a model tells about the runners that can run it."""

from typing import Any

from transformers import PreTrainedModel


def reason_against_batching(model: PreTrainedModel) -> str | None:
    """Return why sequences cannot share a forward pass, as far as the configuration tells."""
    if uses_sliding_window(model):
        return "some layers attend to a sliding window only"
    attention = model.config._attn_implementation
    return None if attention == "sdpa" else f"its attention is {attention}, not sdpa"


def reason_against_exact(model: PreTrainedModel) -> str | None:
    """Return why a token's bits depend on the rest of its batch, where a self-check may miss it."""
    config = model.config.get_text_config()
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if (getattr(config, name, None) or 0) > 1:
            return "the number of tokens that an expert gets depends on the whole batch"
    return None


def uses_sliding_window(model: PreTrainedModel) -> bool:
    """Whether some layer attends to less than all earlier tokens."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None


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
