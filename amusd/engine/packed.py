"""One pass over the new tokens of several slots, packed into one row.

Everything but attention treats tokens alike, so the tokens of all slots share each matrix product;
attention goes slot by slot over that slot's own keys and values, without padding. It plugs into
models of Transformers through their attention and cache interfaces, so the models stay as they are.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (its name everywhere)
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from amusd.engine.slot_cache import SlotCache

ATTENTION = "amusd_packed"
"""Name under which models of Transformers know this attention."""


class PackedCache(Cache):
    """Takes new keys and values to the slots that they belong to, and remembers where they went."""

    def __init__(self, slots: Sequence[SlotCache], sizes: Sequence[int]) -> None:
        """Write ``sizes[i]`` new tokens to ``slots[i]``, in this order."""
        self.sizes = list(sizes)
        self._slots = slots
        # What the layer that runs attends to, slot by slot: keys and values [1, kv_heads, rows, D].
        self.attended: list[tuple[Tensor, Tensor]] = []
        self.masks = [
            _causal_mask(slot.length, size) for slot, size in zip(slots, sizes, strict=True)
        ]
        super().__init__(layers=[_NoLayer() for _ in slots[0].layers])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [1, kv_heads, sum(sizes), D] and return it; attention takes ``attended``."""
        keys, values = key_states.split(self.sizes, 2), value_states.split(self.sizes, 2)
        self.attended = [
            slot.layers[layer_idx].update(k, v)
            for slot, k, v in zip(self._slots, keys, values, strict=True)
        ]
        return key_states, value_states


class _NoLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """A layer that holds nothing itself, for models that ask a cache about its layers."""

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to make."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Never called: the cache takes updates itself."""
        raise NotImplementedError

    def get_seq_length(self) -> int:
        """Return 0; positions are given to the model."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return sizes of a mask that is never made."""
        return query_length, 0

    def get_max_length(self) -> int:
        """Return that there is no limit; slots have theirs."""
        return -1


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    packed: PackedCache,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend slot by slot: query [1, heads, tokens, D] -> [1, tokens, heads, D]."""
    queries = query.split(packed.sizes, 2)
    parts = [
        _attend(q, k, v, mask, scaling)
        for q, (k, v), mask in zip(queries, packed.attended, packed.masks, strict=True)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 2)).transpose(1, 2), None


def _causal_mask(num_held: int, num_new: int) -> Tensor | None:
    """Return which rows each new token sees, [num_new, num_held + num_new]; None: all of them."""
    if num_new == 1:
        return None
    visible = torch.arange(num_held, num_held + num_new)[:, None]
    return torch.arange(num_held + num_new) <= visible


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Attention of the new tokens of a slot, [1, heads, n, D] like the query."""
    _, num_heads, num_new, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    if mask is not None:
        mask = mask.to(query.device)
        shared = num_heads > num_kv_heads
        return F.scaled_dot_product_attention(
            query, keys, values, mask, scale=scaling, enable_gqa=shared
        )
    # Heads that share keys become queries of one head, so that no key is repeated.
    query = query.reshape(1, num_kv_heads, -1, head_dim)
    output = F.scaled_dot_product_attention(query, keys, values, scale=scaling)
    return output.reshape(1, num_heads, num_new, -1)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Packed attention makes its own masks."""


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)
