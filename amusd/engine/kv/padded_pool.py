"""Keys and values of all sequences in one pool of rows, for passes of fixed shapes."""

from torch import Tensor


class PaddedPool:
    """One row for each open sequence, ``[rows, kv_heads, length + 1, head_dim]`` a layer.

    A sequence's token at position p is in column p of its row. Padding is written to the last
    column, which attention never reads. A layer's memory is allocated at its first write.
    """

    def __init__(self, num_rows: int, length: int) -> None:
        """Make a pool for ``num_rows`` sequences of up to ``length`` tokens."""
        self.num_rows = num_rows
        self.padding_column = length
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a layer, allocated for states like these if it is new."""
        if index not in self._layers:
            # Attention multiplies masked values by 0, and 0 times NaN is NaN: start with zeros.
            self._layers[index] = (self._zeros(keys), self._zeros(values))
        return self._layers[index]

    def copy(self, donor: int, target: int, length: int) -> None:
        """Copy the first ``length`` columns of a row to another."""
        for layer in self._layers.values():
            for part in layer:
                part[target, :, :length] = part[donor, :, :length]

    def clear(self, row: int, start: int = 0, end: int | None = None) -> None:
        """Write zeros to columns ``[start, end)`` of a row, which may hold NaN."""
        for layer in self._layers.values():
            for part in layer:
                part[row, :, start:end] = 0

    def _zeros(self, like: Tensor) -> Tensor:
        _, num_heads, _, head_dim = like.shape
        return like.new_zeros(self.num_rows, num_heads, self.padding_column + 1, head_dim)
