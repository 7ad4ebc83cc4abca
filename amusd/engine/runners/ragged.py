"""One pass over the new tokens of several slots, packed into one row.

Everything but attention treats tokens alike, so the tokens of all slots share each matrix product;
attention goes slot by slot over that slot's own keys and values, without padding. It plugs into
models of Transformers through their attention and cache interfaces, so the models stay as they are.

Exact passes have a fixed number of rows, filled up with padding, and attend token by token. So
every matrix product has one shape whatever is in it, and a token's attention one that depends on
its position alone: as long as a row of a product does not depend on its place and on the other
rows (a probe makes sure), a token's bits depend on the tokens before it and on nothing else.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (its name everywhere)
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from amusd.engine.kv.sequence_cache import SequenceCache
from amusd.engine.runners.runner import (
    Chunk,
    PassLimits,
    attention,
    no_mask,
    refuse_variants,
    run_in_passes,
)
from amusd.engine.sampling.sampler import GREEDY, Sampler

ATTENTION = "amusd_packed"
"""Name under which models of Transformers know this attention."""

_EXACT_ROWS = 8
_EXACT_ROWS_BFLOAT16 = 16


def exact_rows(dtype: torch.dtype) -> int:
    """Return the rows of an exact pass on CPU, filled from whichever sessions have tokens.

    Padding is computed like tokens, so a lone token pays for all rows: in float32 8 rows take
    twice the time of one in a model of 135 M parameters, 16 three times, and a pass seldom has
    more tokens to check. In bfloat16 16 rows take hardly more than one where the processor has
    tiles (AMX), and prompts are read twice as fast as by 8.
    """
    return _EXACT_ROWS_BFLOAT16 if dtype is torch.bfloat16 else _EXACT_ROWS


class RaggedRunner:
    """Runs pieces of several sessions in one row of tokens."""

    def __init__(
        self, model: PreTrainedModel, sampler: Sampler = GREEDY, num_rows: int = 0
    ) -> None:
        """Run ``model``; with ``num_rows`` in exact passes of so many rows."""
        self._model = model
        self._sampler = sampler
        self._num_rows = num_rows
        self._num_layers = int(model.config.get_text_config().num_hidden_layers)

    def make(self, capacity: int) -> SequenceCache:
        """Return an empty cache."""
        return SequenceCache(self._num_layers, capacity)

    def copy(self, donor: SequenceCache, target: SequenceCache, length: int) -> None:
        """Copy the first ``length`` rows."""
        target.copy_rows(donor, length)

    def drop(self, buffer: SequenceCache) -> None:
        """Nothing to do: a cache goes with its last reference."""

    def logits(self, pieces: Sequence[Chunk[SequenceCache]]) -> Tensor:
        """Return the logits of all outputs, [outputs, head]."""
        if not self._num_rows:
            return self._run(pieces)
        most = self._num_rows
        return run_in_passes(pieces, PassLimits(most, most, most), self._run)

    def tokens(self, pieces: Sequence[Chunk[SequenceCache]]) -> list[int]:
        """Return the greedy tokens of all outputs."""
        tokens: list[int] = self._sampler.sample(self.logits(pieces)).tolist()
        return tokens

    def _run(self, pieces: Sequence[Chunk[SequenceCache]]) -> Tensor:
        """Run one pass; return the logits of its outputs, [outputs, head]."""
        for piece in pieces:
            piece.buffer.truncate(piece.start)
        tokens = [token for piece in pieces for token in piece.tokens]
        positions = [
            position
            for piece in pieces
            for position in range(piece.start, piece.start + len(piece.tokens))
        ]
        padding = [0] * max(0, self._num_rows - len(tokens))
        cache = RaggedCache(pieces, len(padding), self._num_layers, self._num_rows > 0)
        wanted = list(_output_rows(pieces))
        with attention(self._model, ATTENTION):
            logits: Tensor = self._model(
                input_ids=self._ids([*tokens, *padding]),
                position_ids=self._ids([*positions, *padding]),
                past_key_values=cache,
                packed=cache,
                use_cache=True,
                logits_to_keep=self._rows_of_head(wanted),
            ).logits[0]
        return logits[wanted] if self._num_rows and wanted else logits[: len(wanted)]

    def _rows_of_head(self, wanted: list[int]) -> Tensor | int:
        """Return for which rows the head is computed, as ``logits_to_keep``."""
        if not wanted:
            return 1  # some models refuse to make none
        if self._num_rows:
            return 0  # that is all of them: the head's product keeps its shape too
        return torch.tensor(wanted, device=self._model.device)

    def _ids(self, numbers: list[int]) -> Tensor:
        return torch.tensor([numbers], device=self._model.device)


def _output_rows(pieces: Sequence[Chunk[SequenceCache]]) -> Iterator[int]:
    end = 0
    for piece in pieces:
        end += len(piece.tokens)
        yield from range(end - piece.num_outputs, end)


class RaggedCache(Cache):
    """Takes new keys and values to the slots that they belong to, and remembers where they went."""

    def __init__(
        self,
        pieces: Sequence[Chunk[SequenceCache]],
        num_padding: int,
        num_layers: int,
        token_by_token: bool = False,
    ) -> None:
        """Take the tokens of ``pieces`` in this order, and ``num_padding`` that nothing keeps."""
        self._slots = [piece.buffer for piece in pieces]
        self._written = [len(piece.tokens) for piece in pieces]
        self._num_padding = num_padding
        self._token_by_token = token_by_token
        # Tokens that attend together, and which rows of their slot each of them sees.
        self.sizes = [1] * sum(self._written) if token_by_token else self._written
        self.masks: list[Tensor | None] = (
            [None] * len(self.sizes)
            if token_by_token
            else [_causal_mask(piece.start, len(piece.tokens)) for piece in pieces]
        )
        # What the layer that runs attends to: keys and values [1, kv_heads, rows, D].
        self.attended: list[tuple[Tensor, Tensor]] = []
        layers = [NoLayer() for _ in range(num_layers)]  # type: ignore[no-untyped-call]
        super().__init__(layers=list(layers))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [1, kv_heads, tokens and padding, D], return it; attention takes ``attended``."""
        sizes = [*self._written, self._num_padding]
        keys = torch.split(key_states, sizes, 2)
        values = torch.split(value_states, sizes, 2)
        self.attended = []
        for slot, k, v in zip(self._slots, keys, values, strict=False):  # without the padding
            layer = slot.layers[layer_idx]
            assert isinstance(layer, CacheLayerMixin)
            rows = layer.update(k, v)
            self.attended += _per_token(rows, k.shape[2]) if self._token_by_token else [rows]
        return key_states, value_states

    def pad(self, outputs: list[Tensor]) -> Tensor:
        """Join attention's outputs, [1, heads, n, D] each, and fill up with zeros."""
        if self._num_padding:
            first = outputs[0]
            shape = (*first.shape[:2], self._num_padding, first.shape[3])
            outputs = [*outputs, first.new_zeros(shape)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


class NoLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
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


def ragged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    packed: RaggedCache,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend slot by slot: query [1, heads, tokens, D] -> [1, tokens, heads, D]."""
    refuse_variants(kwargs)
    sizes = [*packed.sizes, query.shape[2] - sum(packed.sizes)]
    queries = torch.split(query, sizes, 2)[:-1]
    outputs = [
        _attend(q, k, v, mask, scaling)
        for q, (k, v), mask in zip(queries, packed.attended, packed.masks, strict=True)
    ]
    return packed.pad(outputs).transpose(1, 2), None


def _per_token(rows: tuple[Tensor, Tensor], num_new: int) -> list[tuple[Tensor, Tensor]]:
    """Return the keys and values that each of the last ``num_new`` tokens sees."""
    keys, values = rows
    ends = range(keys.shape[2] - num_new + 1, keys.shape[2] + 1)
    return [(keys[:, :, :end], values[:, :, :end]) for end in ends]


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


AttentionInterface.register(ATTENTION, ragged_attention)
AttentionMaskInterface.register(ATTENTION, no_mask)
