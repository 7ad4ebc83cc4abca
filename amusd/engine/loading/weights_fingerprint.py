"""A fingerprint of a model's weights, from samples: cheap, and another for another model.

It tells replicas of one model from those of another that was put in its place; it is no proof
against someone who wants to deceive.
"""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES = 16  # weights of each tensor, evenly spread
_NO_MATTER = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


def weights_fingerprint(model: nn.Module, config: dict[str, Any]) -> str:
    """Return 32 hexadecimal digits for the weights of ``model`` and its settings.

    Args:
        model: the model as it was loaded.
        config: settings that change what it computes, defaults left out, for those are others
            in other versions of a library.
    """
    digest = hashlib.sha256()
    kept = {key: value for key, value in config.items() if key not in _NO_MATTER}
    # An object that JSON does not know counts by its kind, for its words may hold an address.
    text = json.dumps(kept, sort_keys=True, default=lambda value: type(value).__name__)
    digest.update(text.encode())
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(_samples(weight))
    return digest.hexdigest()[:32]


def _samples(weight: Tensor) -> bytes:
    """Return a few weights of a tensor as bytes, without copying the others."""
    if weight.numel() == 0 or weight.is_meta:
        return b""
    # [n] int64; one index a dimension, for the tensor need not be contiguous
    num_samples = min(_SAMPLES, weight.numel())
    places = torch.arange(num_samples) * (weight.numel() - 1) // max(1, num_samples - 1)
    indices = torch.unravel_index(places.to(weight.device), weight.shape)
    return bytes(weight.detach()[indices].float().cpu().numpy().tobytes())
