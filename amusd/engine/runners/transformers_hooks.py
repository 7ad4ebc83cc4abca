"""How runners plug into models of Transformers: their own attention and cache, for one call.

The models stay as they are, so other code can use the same model in the usual way.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Make the model use the attention registered as ``name`` inside this context."""
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


def no_mask(*args: object, **kwargs: object) -> None:
    """Mask function for attention functions that make their own masks."""


def refuse_variants(arguments: Mapping[str, object], num_keys: int) -> None:
    """Raise NotImplementedError if a layer asks for more than standard attention.

    A window over at least ``num_keys`` tokens, which is all that there are, changes nothing.
    """
    window = arguments.get("sliding_window")
    if isinstance(window, int) and window < num_keys:
        raise NotImplementedError(f"its attention has a sliding window of {window} tokens")
    for name in ("softcap", "s_aux", "position_bias"):
        if arguments.get(name) is not None:
            raise NotImplementedError(f"its attention has a {name}")


class EmptyLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """A cache layer without content, for caches that keep keys and values elsewhere.

    Some models ask a cache about its layers.
    """

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: there is no tensor to allocate."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Raise: the cache handles updates and never asks a layer."""
        raise NotImplementedError

    def get_seq_length(self) -> int:
        """Return 0: the runner passes positions to the model."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the sizes of a mask that no one makes."""
        return query_length, 0

    def get_max_length(self) -> int:
        """Return -1, no limit: each sequence has its own."""
        return -1
