"""Builds a draft from a verify model: some of its layers, its embedding, a reduced output head.

It relies on a structure that causal language models of Transformers share: one list of
``num_hidden_layers`` layers below the base model. It knows no architecture by name.
"""

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from amusd.pair.checkpoint import HEAD_SIZE_KEY
from amusd.protocol.errors import InvalidInputError

_SAMPLES = 64  # values per weight that enter the fingerprint


def fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of the names and shapes of all weights of ``model``, and of sampled values."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES].float().cpu().numpy()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(some.tobytes())
    return digest.hexdigest()


def layer_list(model: PreTrainedModel) -> str:
    """Return the name of the list of layers, such as ``model.layers``.

    Raises:
        InvalidInputError: the architecture has no such list.
    """
    config: Any = model.config.get_text_config()
    num_layers = getattr(config, "num_hidden_layers", None)
    found: list[str] = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if len(found) != 1 or config is not model.config:
        raise InvalidInputError(
            f"cannot cut layers out of {type(model).__name__}: it is not one list of equal layers; "
            "use a text-only causal language model, for example of the Llama, Qwen, Mistral or "
            "GPT-2 family"
        )
    return found[0]


def default_layers(num_layers: int, num_chosen: int) -> tuple[int, ...]:
    """Return the first ``num_chosen`` layers, whose input is the embedding as in the verify model.

    Raises:
        InvalidInputError: the model has fewer layers.
    """
    if not 1 <= num_chosen <= num_layers:
        raise InvalidInputError(
            f"the verify model has {num_layers} layers: choose 1 to {num_layers}, not {num_chosen}"
        )
    return tuple(range(num_chosen))


def cut(model: PreTrainedModel, layers: Sequence[int], head_ids: Tensor | None) -> PreTrainedModel:
    """Return an untrained draft of ``model``, in float32 on CPU.

    Args:
        model: the verify model.
        layers: the layers of the draft, in order, counted from 0.
        head_ids: the tokens of a reduced output head, [H]; None keeps the whole head.

    Raises:
        InvalidInputError: a layer does not exist, or the architecture is not supported.
    """
    prefix = layer_list(model)
    num_layers = int(model.config.num_hidden_layers)
    wrong = [layer for layer in layers if not 0 <= layer < num_layers]
    if wrong or not layers:
        raise InvalidInputError(
            f"the verify model has layers 0 to {num_layers - 1}: there is no layer {wrong[:1]}"
        )
    draft: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        _config(model, layers), dtype=torch.float32
    )
    try:
        draft.load_state_dict(_chosen_weights(model, prefix, layers))
    except RuntimeError as error:
        raise InvalidInputError(
            f"cannot cut layers out of {type(model).__name__}: {str(error).splitlines()[0]}"
        ) from error
    _reset_final_norm(draft)
    if head_ids is not None:
        reduce_head(draft, head_ids)
    return draft  # type: ignore[no-any-return]


def reduce_head(draft: PreTrainedModel, head_ids: Tensor) -> None:
    """Keep only the rows ``head_ids`` [H] of the output head (FR-Spec, arXiv 2502.14856)."""
    whole = output_head(draft)
    rows, hidden_size = len(head_ids), whole.weight.shape[1]
    head = nn.Linear(hidden_size, rows, bias=whole.bias is not None, dtype=whole.weight.dtype)
    with torch.no_grad():
        head.weight.copy_(whole.weight[head_ids])
        if whole.bias is not None:
            head.bias.copy_(whole.bias[head_ids])
    draft.config.tie_word_embeddings = False
    setattr(draft.config, HEAD_SIZE_KEY, rows)
    draft.set_output_embeddings(head)  # type: ignore[no-untyped-call]


def output_head(model: PreTrainedModel) -> Any:
    """Return the linear layer that computes logits; its weights are [V, D]."""
    return model.get_output_embeddings()  # type: ignore[no-untyped-call]


def stop_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Return the stop tokens of a model."""
    stops = model.generation_config.eos_token_id if model.generation_config else None
    if stops is None:
        stops = tokenizer.eos_token_id
    return list(stops) if isinstance(stops, list) else [] if stops is None else [stops]


def trainable(draft: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the trained weights: layers and final norm, without embeddings and head."""
    prefix = f"{layer_list(draft)}."
    tables = [module for module in draft.modules() if isinstance(module, nn.Embedding)]
    frozen = {
        id(weight) for table in [*tables, output_head(draft)] for weight in table.parameters()
    }
    return {
        name: weight
        for name, weight in draft.named_parameters()
        if name.startswith(prefix) or id(weight) not in frozen
    }


def _config(model: PreTrainedModel, layers: Sequence[int]) -> Any:
    config = copy.deepcopy(model.config)
    for name, value in model.config.to_dict().items():
        if isinstance(value, list) and len(value) == model.config.num_hidden_layers:
            setattr(config, name, [value[layer] for layer in layers])
    config.num_hidden_layers = len(layers)
    return config


def _chosen_weights(
    model: PreTrainedModel, prefix: str, layers: Sequence[int]
) -> dict[str, Tensor]:
    targets: dict[str, list[int]] = {}  # from a layer of the verify model to layers of the draft
    for target, chosen in enumerate(layers):
        targets.setdefault(str(chosen), []).append(target)
    weights: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        if not name.startswith(f"{prefix}."):
            weights[name] = weight.float().cpu()
            continue
        layer, _, rest = name.removeprefix(f"{prefix}.").partition(".")
        for target in targets.get(layer, []):
            weights[f"{prefix}.{target}.{rest}"] = weight.float().cpu()
    return weights


def _reset_final_norm(draft: PreTrainedModel) -> None:
    """Set the final norm to ones: the verify model's norm expects the output of all layers."""
    for module in draft.base_model.children():
        # Some norms (Gemma's) add 1 to their weight; they are left unchanged.
        if (
            type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
            and float(
                module.weight.detach().abs().mean()  # type: ignore[operator]
            )
            > 1.0
        ):
            nn.init.ones_(module.weight)  # type: ignore[arg-type]
