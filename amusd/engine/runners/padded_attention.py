"""Attention and cache of padded passes: they write to the KV pool and read it in fixed shapes."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (its name everywhere)
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache

from amusd.engine.kv.padded_pool import PaddedPool
from amusd.engine.runners.shape_buckets import Shape
from amusd.engine.runners.transformers_hooks import EmptyLayer, no_mask, refuse_variants

PADDED_ATTENTION = "amusd_padded"
"""The name of this attention in Transformers."""


class PaddedCache(Cache):
    """Writes the keys and values of one pass to the pool, and masks what its tokens do not see."""

    def __init__(
        self, pool: PaddedPool, shape: Shape, positions: Tensor, columns: Tensor, num_layers: int
    ) -> None:
        """Write to ``columns`` [batch, query]. A token sees the columns up to its position."""
        self._pool = pool
        self._shape = shape
        self._columns = columns[:, None, :, None]
        known = torch.arange(shape.kv_length, device=positions.device)
        self._hidden = known > positions[..., None]  # [batch, query, kv_length]
        self._mask: Tensor | None = None
        layers = [EmptyLayer() for _ in range(num_layers)]  # type: ignore[no-untyped-call]
        super().__init__(layers=list(layers))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [batch, kv_heads, query, head_dim]; return the shape's part of the pool."""
        keys, values = self._pool.layer(layer_idx, key_states, value_states)
        return self._write(keys, key_states), self._write(values, value_states)

    def mask(self, num_shared: int, dtype: torch.dtype) -> Tensor:
        """Return what to add to the scores, [batch, 1, num_shared * query, kv_length].

        ``num_shared`` is the number of query heads for each key head.
        """
        if self._mask is None:
            mask = torch.zeros(self._hidden.shape, dtype=dtype, device=self._hidden.device)
            mask = mask.masked_fill(self._hidden, float("-inf"))
            self._mask = mask.repeat(1, num_shared, 1)[:, None]
        return self._mask

    def _write(self, rows: Tensor, states: Tensor) -> Tensor:
        rows = rows[: self._shape.batch]
        rows.scatter_(2, self._columns.expand(states.shape), states)
        return rows[:, :, : self._shape.kv_length]


def padded_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    padded: PaddedCache,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend to all columns: [batch, heads, query, head_dim] -> [batch, query, heads, head_dim]."""
    refuse_variants(kwargs, key.shape[2])
    batch, num_heads, query_length, head_dim = query.shape
    num_kv_heads = key.shape[1]
    # Query heads that share a key head become more queries of one head, so no key is repeated.
    queries = query.reshape(batch, num_kv_heads, -1, head_dim)
    mask = padded.mask(num_heads // num_kv_heads, query.dtype)
    output = F.scaled_dot_product_attention(queries, key, value, mask, scale=scaling)
    return output.reshape(batch, num_heads, query_length, -1).transpose(1, 2), None


AttentionInterface.register(PADDED_ATTENTION, padded_attention)
AttentionMaskInterface.register(PADDED_ATTENTION, no_mask)
