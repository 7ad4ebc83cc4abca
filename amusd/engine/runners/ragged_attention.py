"""Attention and cache of ragged batches: each sequence attends to its own keys and values."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (its name everywhere)
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from amusd.engine.kv.sequence_cache import SequenceCache
from amusd.engine.runners.runner import Chunk
from amusd.engine.runners.transformers_hooks import EmptyLayer, no_mask, refuse_variants

RAGGED_ATTENTION = "amusd_ragged"
"""The name of this attention in Transformers."""


class RaggedCache(Cache):
    """Writes the keys and values of a batch to the caches of its sequences."""

    def __init__(
        self,
        batch: Sequence[Chunk[SequenceCache]],
        num_padding: int,
        num_layers: int,
        token_by_token: bool = False,
    ) -> None:
        """Take the tokens of ``batch`` in this order, then ``num_padding`` that are dropped."""
        self._caches = [chunk.buffer for chunk in batch]
        self._chunk_sizes = [len(chunk.tokens) for chunk in batch]
        self._num_padding = num_padding
        self._token_by_token = token_by_token
        # Tokens that attend together, and which tokens of their sequence each of them sees.
        self.sizes = [1] * sum(self._chunk_sizes) if token_by_token else self._chunk_sizes
        self.masks: list[Tensor | None] = (
            [None] * len(self.sizes)
            if token_by_token
            else [_causal_mask(chunk.start, len(chunk.tokens)) for chunk in batch]
        )
        # What the current layer attends to: keys and values [1, kv_heads, tokens, head_dim].
        self.attended: list[tuple[Tensor, Tensor]] = []
        layers = [EmptyLayer() for _ in range(num_layers)]  # type: ignore[no-untyped-call]
        super().__init__(layers=list(layers))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write and return [1, kv_heads, batch tokens, head_dim]; attention reads ``attended``."""
        sizes = [*self._chunk_sizes, self._num_padding]
        keys = torch.split(key_states, sizes, 2)
        values = torch.split(value_states, sizes, 2)
        self.attended = []
        for cache, k, v in zip(self._caches, keys, values, strict=False):  # without the padding
            layer = cache.layers[layer_idx]
            assert isinstance(layer, CacheLayerMixin)
            held = layer.update(k, v)
            self.attended += _per_token(held, k.shape[2]) if self._token_by_token else [held]
        return key_states, value_states

    def pad(self, outputs: list[Tensor]) -> Tensor:
        """Join the outputs of attention, [1, heads, n, head_dim] each, and append zeros."""
        if self._num_padding:
            first = outputs[0]
            shape = (*first.shape[:2], self._num_padding, first.shape[3])
            outputs = [*outputs, first.new_zeros(shape)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


def ragged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    ragged: RaggedCache,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend sequence by sequence: [1, heads, tokens, head_dim] -> [1, tokens, heads, head_dim]."""
    refuse_variants(kwargs, max(keys.shape[2] for keys, _ in ragged.attended))
    sizes = [*ragged.sizes, query.shape[2] - sum(ragged.sizes)]
    queries = torch.split(query, sizes, 2)[:-1]
    outputs = [
        _attend(q, k, v, mask, scaling)
        for q, (k, v), mask in zip(queries, ragged.attended, ragged.masks, strict=True)
    ]
    return ragged.pad(outputs).transpose(1, 2), None


def _per_token(held: tuple[Tensor, Tensor], num_new: int) -> list[tuple[Tensor, Tensor]]:
    """Return the keys and values that each of the last ``num_new`` tokens sees."""
    keys, values = held
    ends = range(keys.shape[2] - num_new + 1, keys.shape[2] + 1)
    return [(keys[:, :, :end], values[:, :, :end]) for end in ends]


def _causal_mask(num_held: int, num_new: int) -> Tensor | None:
    """Return which tokens each new token sees, [num_new, num_held + num_new]; None: all."""
    if num_new == 1:
        return None
    visible = torch.arange(num_held, num_held + num_new)[:, None]
    return torch.arange(num_held + num_new) <= visible


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Return the attention of a sequence's new tokens, [1, heads, n, head_dim] like the query."""
    _, num_heads, num_new, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    if mask is not None:
        mask = mask.to(query.device)
        shared = num_heads > num_kv_heads
        return F.scaled_dot_product_attention(
            query, keys, values, mask, scale=scaling, enable_gqa=shared
        )
    # Query heads that share a key head become more queries of one head, so no key is repeated.
    query = query.reshape(1, num_kv_heads, -1, head_dim)
    output = F.scaled_dot_product_attention(query, keys, values, scale=scaling)
    return output.reshape(1, num_heads, num_new, -1)


AttentionInterface.register(RAGGED_ATTENTION, ragged_attention)
AttentionMaskInterface.register(RAGGED_ATTENTION, no_mask)
