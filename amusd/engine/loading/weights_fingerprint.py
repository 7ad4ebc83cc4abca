"""A fingerprint of a model's weights, computed from a few samples of each tensor.

It distinguishes the replicas of one model from those of another one. It does not protect against
someone who forges weights.
"""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES = 16  # weights of each tensor, evenly spaced
_IGNORED_SETTINGS = (
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
)


def weights_fingerprint(model: nn.Module, config: dict[str, Any]) -> str:
    """Return 32 hexadecimal digits for the weights of ``model`` and its settings.

    Args:
        model: the loaded model.
        config: the settings that change its results, without defaults, because defaults differ
            between versions of Transformers.
    """
    digest = hashlib.sha256()
    kept = {key: value for key, value in config.items() if key not in _IGNORED_SETTINGS}
    # An object that JSON does not know counts by its type, because its repr may have an address.
    text = json.dumps(kept, sort_keys=True, default=lambda value: type(value).__name__)
    digest.update(text.encode())
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(_samples(weight))
    return digest.hexdigest()[:32]


def _samples(weight: Tensor) -> bytes:
    """Return a few weights of a tensor as bytes, without copying the rest."""
    if weight.numel() == 0 or weight.is_meta:
        return b""
    # [n] int64; one index a dimension, because the tensor may not be contiguous
    num_samples = min(_SAMPLES, weight.numel())
    places = torch.arange(num_samples) * (weight.numel() - 1) // max(1, num_samples - 1)
    indices = torch.unravel_index(places.to(weight.device), weight.shape)
    return bytes(weight.detach()[indices].float().cpu().numpy().tobytes())
