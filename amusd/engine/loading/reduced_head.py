"""Loads causal language models, with a full or a reduced output head.

A reduced head covers only frequent tokens (FR-Spec, arXiv 2502.14856). A folder with
`amusd_head_size` in its config.json has an `lm_head.weight` of that many rows and a tensor
`head_token_ids` that maps a row to its token.
"""

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.hub import cached_file

from amusd.engine.loading.weights_report import refuse_wrong_weights, without_reports
from amusd.pair.checkpoint import HEAD_IDS_NAME, HEAD_SIZE_KEY


def load_causal_lm(
    folder_or_hub_id: str, dtype: torch.dtype, device: torch.device | str
) -> tuple[PreTrainedModel, Tensor | None]:
    """Load a model for inference, and the token id of each row if its head is reduced.

    The ids are [head] int64 on `device`, or None for a full head. With a reduced head the model's
    logits are [..., head] and its own `generate` returns rows instead of token ids.

    Raises:
        ValueError: the model has an encoder, or the weights do not fit the configuration.
    """
    config = AutoConfig.from_pretrained(folder_or_hub_id)
    if config.is_encoder_decoder:
        raise ValueError(
            f"models of type {config.model_type} have an encoder, which is not served: choose a "
            "causal language model"
        )
    if getattr(config, HEAD_SIZE_KEY, None) is None:
        return _ready(_load_whole(folder_or_hub_id, dtype), device), None
    state = load_file(str(cached_file(folder_or_hub_id, "model.safetensors")))
    if "lm_head.weight" not in state:
        raise ValueError(f"{HEAD_SIZE_KEY} is set, but the weights have no lm_head.weight")
    head_token_ids = _checked_ids(state, getattr(config, HEAD_SIZE_KEY), config.vocab_size)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    rows, hidden_size = state["lm_head.weight"].shape
    model.set_output_embeddings(nn.Linear(hidden_size, rows, bias=False, dtype=dtype))
    model.load_state_dict(state)
    return _ready(model, device), head_token_ids.to(device)


def _load_whole(folder_or_hub_id: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model with a full head."""
    with without_reports():
        found: Any = AutoModelForCausalLM.from_pretrained(
            folder_or_hub_id,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    model: PreTrainedModel
    model, report = found
    refuse_wrong_weights(folder_or_hub_id, report)
    return model


def _ready(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    # The methods of Transformers have no types or wrong ones, so call those of nn.Module.
    nn.Module.to(model, device)
    nn.Module.eval(model)
    return model


def _checked_ids(state: dict[str, Tensor], head_size: int, vocab_size: int) -> Tensor:
    """Take the token ids out of `state`. Wrong ids would silently turn proposals into others."""
    ids = state.pop(HEAD_IDS_NAME, torch.empty(0, dtype=torch.int64))
    if not len(ids) == len(state["lm_head.weight"]) == head_size:
        raise ValueError(
            f"{HEAD_SIZE_KEY} is {head_size}, but there are {len(ids)} head token ids and "
            f"{len(state['lm_head.weight'])} head rows; write the model folder again"
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"{HEAD_IDS_NAME} has ids outside the vocabulary of {vocab_size}")
    return ids
