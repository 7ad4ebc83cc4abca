"""The KV cache of one sequence: preallocated, written in place, rolled back by its length.

``DynamicCache`` of Transformers copies all keys and values for each new token. Here a forward pass
writes the new ones after the valid ones and attention gets views, so nothing is copied. A rollback
only lowers the length. Tensors have the whole capacity of the sequence; on CPU the system gives
them memory as they fill.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache


class CacheLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, each ``[batch, kv_heads, tokens, head_dim]``.

    Serving uses a batch of 1. Writing training data uses more, all of the same length.
    """

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        """Make an empty layer for at most ``capacity`` tokens."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the whole capacity in the shape and dtype of the first states."""
        self.keys = self._allocate(key_states)
        self.values = self._allocate(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new tokens after the valid ones; return views of all valid tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        keys, values = self._buffers()
        keys[:, :, start : self.length] = key_states
        values[:, :, start : self.length] = value_states
        return keys[:, :, : self.length], values[:, :, : self.length]

    def copy_prefix(self, donor: "CacheLayer", length: int) -> None:
        """Copy the first ``length`` tokens of another layer, if it has any.

        A layer that uses another layer's keys and values never has tokens of its own.
        """
        if not donor.is_initialized:
            return
        donor_keys, donor_values = donor._buffers()
        if not self.is_initialized:
            self.lazy_initialization(donor_keys, donor_values)
        keys, values = self._buffers()
        keys[:, :, :length] = donor_keys[:, :, :length]
        values[:, :, :length] = donor_values[:, :, :length]
        self.length = length

    def get_seq_length(self) -> int:
        """Return the number of valid tokens."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of tokens that attention sees, and the position of the first one."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """Return the capacity in tokens."""
        return self._capacity

    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _allocate(self, like: torch.Tensor) -> torch.Tensor:
        batch, num_heads, _, head_dim = like.shape
        shape = (batch, num_heads, self._capacity, head_dim)
        return torch.empty(shape, dtype=like.dtype, device=like.device)


class SequenceCache(Cache):
    """The layers of one sequence. Its length is the number of valid tokens."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        """Make an empty cache for at most ``capacity`` tokens."""
        self._own_layers = [CacheLayer(capacity) for _ in range(num_layers)]
        super().__init__(layers=list(self._own_layers))
        self.capacity = capacity

    @property
    def length(self) -> int:
        """Number of valid tokens. Layers without tokens of their own do not count."""
        return max(layer.length for layer in self._own_layers)

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` tokens, without a copy."""
        for layer in self._own_layers:
            layer.length = min(layer.length, length)

    def copy_prefix(self, donor: "SequenceCache", length: int) -> None:
        """Copy the first ``length`` tokens of another cache."""
        for layer, other in zip(self._own_layers, donor._own_layers, strict=True):
            layer.copy_prefix(other, length)


class CopyingCache(DynamicCache):
    """The cache of Transformers, for models that need it. Each forward pass copies all of it."""

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        num_dropped = self.get_seq_length() - length
        if num_dropped <= 0:
            return
        layer: Any
        for layer in self.layers:
            # After a pass that failed, only the first layers hold its tokens.
            if not isinstance(layer, CacheLayerMixin) or layer.get_seq_length() > length:
                layer.crop(-num_dropped)
