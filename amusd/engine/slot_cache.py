"""Key/value cache of a session: preallocated, written in place, rolled back by its length.

``DynamicCache`` of Transformers copies all keys and values for each new token. Here a pass
writes its rows behind the valid ones and attention gets views, so nothing is copied; a rollback
only lowers the length. Buffers grow by doubling up to the slot's capacity.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

_FIRST_ROWS = 256


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, each ``[batch, kv_heads, rows, head_dim]``.

    A session has a batch of 1; text is written for training data with more, all of one length.
    """

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        """Make an empty layer for at most ``capacity`` tokens."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the first rows in the shape and type of the first states."""
        self.keys = self._allocate(key_states, _FIRST_ROWS)
        self.values = self._allocate(value_states, _FIRST_ROWS)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new rows behind the valid ones; return views of all valid rows."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys = self._with_rows(self.keys, key_states, start)
        self.values = self._with_rows(self.values, value_states, start)
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        """Return the number of valid rows."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of rows that attention sees, and the first one's position."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """Return the most tokens the layer takes."""
        return self._capacity

    def _with_rows(
        self, buffer: torch.Tensor | None, states: torch.Tensor, start: int
    ) -> torch.Tensor:
        """Write ``states`` from row ``start`` on, into a larger buffer if they do not fit."""
        end = start + states.shape[2]
        if buffer is None or end > buffer.shape[2]:
            grown = self._allocate(states, max(end, 2 * start))
            if buffer is not None:
                grown[:, :, :start] = buffer[:, :, :start]
            buffer = grown
        buffer[:, :, start:end] = states
        return buffer

    def _allocate(self, like: torch.Tensor, rows: int) -> torch.Tensor:
        batch, num_heads, _, head_dim = like.shape
        shape = (batch, num_heads, min(rows, self._capacity), head_dim)
        return torch.empty(shape, dtype=like.dtype, device=like.device)


class SlotCache(Cache):
    """The layers of one session. Its length is the number of tokens that are valid."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        """Make an empty cache for at most ``capacity`` tokens."""
        self._slot_layers = [SlotLayer(capacity) for _ in range(num_layers)]
        super().__init__(layers=list(self._slot_layers))
        self.capacity = capacity

    @property
    def length(self) -> int:
        """Number of valid tokens."""
        return self._slot_layers[0].length

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` tokens; costs no copy."""
        for layer in self._slot_layers:
            layer.length = min(layer.length, length)
