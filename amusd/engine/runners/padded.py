"""Passes of fixed shapes over a static pool of keys and values, the way on CUDA.

Row i of a pass is row i of the pool: a session has a row for as long as it is open. A row brings
up to ``window`` tokens and the rest is padding, so the same few shapes come again and again and
can be captured as CUDA graphs. Padding is written to a last column of the pool that nothing reads,
and columns behind a token are masked.

With numerics fast a pass takes the smallest shape that fits. With numerics exact there is one
shape for all passes. It plugs into models of Transformers through their attention and cache
interfaces. On CPU all of this runs, and is tested, but for the graphs and pinned memory, which
have not run on a GPU yet.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (its name everywhere)
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache

from amusd.engine.runners.graph_capture import Capture, Replay, direct
from amusd.engine.runners.ragged import NoLayer
from amusd.engine.runners.runner import (
    Chunk,
    PassLimits,
    attention,
    no_mask,
    refuse_variants,
    run_in_passes,
)
from amusd.engine.sampling.sampler import GREEDY, Sampler

ATTENTION = "amusd_static"
"""Name under which models of Transformers know this attention."""

EXACT_WINDOW = 8
"""Tokens a row in an exact pass: verify passes seldom have more, and padding costs little on CUDA,
where a pass of a few hundred tokens takes about as long as reading the weights."""

_MAX_TOKENS = 512  # of a pass, padding included: beyond, a GPU computes longer than it reads
_MAX_WINDOW = 64
_MIN_LENGTH = 256
_LENGTH_FACTOR = 4  # between the lengths of shapes; each shape is a graph to capture at start


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows of a pass, tokens a row, and columns of the pool that attention reads."""

    batch: int
    window: int
    length: int


@dataclass(frozen=True, slots=True)
class Buckets:
    """The shapes that passes may have: each number ascends, and the last one is the most."""

    batches: tuple[int, ...]
    windows: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def fast(cls, num_rows: int, length: int) -> "Buckets":
        """Return few shapes of which one fits any pass without much padding."""
        return cls(
            _ascending(1, num_rows, 2),
            _ascending(1, _MAX_WINDOW, 2),
            _ascending(_MIN_LENGTH, length, _LENGTH_FACTOR),
        )

    @classmethod
    def exact(cls, num_rows: int, length: int, window: int = EXACT_WINDOW) -> "Buckets":
        """Return the one shape of exact passes."""
        return cls((num_rows,), (window,), (length,))

    def window_limit(self, batch: int) -> int:
        """Return the most tokens a row may have beside so many rows."""
        fitting = [window for window in self.windows if batch * window <= _MAX_TOKENS]
        return max(fitting, default=self.windows[0])

    def fit(self, rows: int, tokens: int, columns: int) -> Shape:
        """Return the smallest shape for so many rows, tokens a row, and columns."""
        return Shape(
            _smallest(self.batches, rows),
            _smallest(self.windows, tokens),
            _smallest(self.lengths, columns),
        )

    def shapes(self) -> list[Shape]:
        """Return all shapes, the largest first, so that graphs share its memory."""
        return [
            Shape(batch, window, length)
            for length in reversed(self.lengths)
            for batch in reversed(self.batches)
            for window in reversed(self.windows)
            if window <= self.window_limit(batch)
        ]


class PaddedRunner:
    """Runs pieces of several sessions in passes of fixed shapes; a buffer is a row of the pool."""

    def __init__(
        self,
        model: PreTrainedModel,
        buckets: Buckets,
        sampler: Sampler = GREEDY,
        capture: Capture = direct,
    ) -> None:
        """Run ``model``; passes are captured when their shape first comes, see ``warm_up``."""
        self._model = model
        self._sampler = sampler
        self._buckets = buckets
        self._capture = capture
        self._num_layers = int(model.config.get_text_config().num_hidden_layers)
        self._pool = Pool(buckets.batches[-1], buckets.lengths[-1])
        self._free = list(range(self._pool.num_rows))
        self._programs: dict[Shape, _Program] = {}
        self._logits: Tensor | None = None  # [tokens of the largest shape, head]

    @property
    def num_rows(self) -> int:
        """Most sessions that are open at a time."""
        return self._pool.num_rows

    def make(self, capacity: int) -> int:
        """Return the lowest free row, for passes have all rows up to the highest one."""
        row = min(self._free)
        self._free.remove(row)
        return row

    def copy(self, donor: int, target: int, length: int) -> None:
        """Copy the first ``length`` columns."""
        self._pool.copy(donor, target, length)

    def drop(self, buffer: int) -> None:
        """Free the row."""
        self._free.append(buffer)

    def logits(self, pieces: Sequence[Chunk[int]]) -> Tensor:
        """Return the logits of all outputs, [outputs, head]."""
        return self._run_all(pieces, lambda program: program.run()[0])

    def tokens(self, pieces: Sequence[Chunk[int]]) -> list[int]:
        """Return the greedy tokens of all outputs."""
        tokens: list[int] = self._run_all(pieces, lambda program: program.run()[1]).tolist()
        return tokens

    def warm_up(self) -> int:
        """Make all shapes ready, so that no session waits for one; return their number."""
        shapes = self._buckets.shapes()
        for shape in shapes:
            self._program(shape)
        return len(shapes)

    def _run_all(self, pieces: Sequence[Chunk[int]], run: "Callable[[_Program], Tensor]") -> Tensor:
        batch = self._buckets.fit(_num_rows(pieces), 1, 1).batch
        limits = PassLimits(_MAX_TOKENS, self._buckets.window_limit(batch), batch)
        return run_in_passes(pieces, limits, lambda parts: self._run(parts, run))

    def _run(self, pieces: Sequence[Chunk[int]], run: "Callable[[_Program], Tensor]") -> Tensor:
        """Run one pass; return of what ``run`` gives, [batch, window, ...], the outputs' part."""
        shape = self._buckets.fit(
            rows=_num_rows(pieces),
            tokens=max(len(piece.tokens) for piece in pieces),
            columns=max(piece.start + len(piece.tokens) for piece in pieces),
        )
        program = self._program(shape)
        program.fill(pieces)
        found = run(program)
        places = [
            (piece.buffer, place)
            for piece in pieces
            for place in range(len(piece.tokens) - piece.num_outputs, len(piece.tokens))
        ]
        return found[[row for row, _ in places], [place for _, place in places]]

    def _program(self, shape: Shape) -> "_Program":
        if shape not in self._programs:
            self._programs[shape] = _Program(
                shape, self._pool, self._model.device, self._capture, self._forward
            )
        return self._programs[shape]

    def _forward(self, shape: Shape, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Run the model over inputs [3, batch, window]: the one function that is captured."""
        ids, positions, columns = inputs
        cache = PaddedCache(self._pool, shape, positions, columns, self._num_layers)
        with attention(self._model, ATTENTION):
            logits: Tensor = self._model(
                input_ids=ids,
                position_ids=positions,
                past_key_values=cache,
                static=cache,
                use_cache=True,
            ).logits  # [batch, window, head]
        return self._keep(logits), self._sampler.sample(logits)

    def _keep(self, logits: Tensor) -> Tensor:
        """Copy logits to where those of all shapes go, or each graph would hold memory for its."""
        batch, window, head_size = logits.shape
        if self._logits is None:
            most = max(shape.batch * shape.window for shape in self._buckets.shapes())
            self._logits = logits.new_empty(most, head_size)
        return self._logits[: batch * window].view(logits.shape).copy_(logits)


class _Program:
    """A pass of one shape, ready to run: its inputs on both sides and what runs it."""

    def __init__(
        self,
        shape: Shape,
        pool: "Pool",
        device: torch.device,
        capture: Capture,
        forward: Callable[[Shape, Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        self._padding_column = pool.padding_column
        self._on_cuda = device.type == "cuda"
        size = (3, shape.batch, shape.window)  # ids, positions, columns of the pool
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=self._on_cuda)
        self._inputs = torch.zeros(size, dtype=torch.int64, device=device)
        self._inputs[2] = pool.padding_column
        self._tokens = torch.zeros(size[1:], dtype=torch.int64, pin_memory=self._on_cuda)
        self._replay: Replay = capture(functools.partial(forward, shape), self._inputs)

    def fill(self, pieces: Sequence[Chunk[int]]) -> None:
        """Write the pieces' tokens, and padding everywhere else, to the host's side."""
        ids, positions, columns = self._host
        ids.zero_()
        positions.zero_()  # one that every model knows, and sees column 0
        columns.fill_(self._padding_column)
        for piece in pieces:
            size, row = len(piece.tokens), piece.buffer
            places = torch.arange(piece.start, piece.start + size)
            ids[row, :size] = torch.tensor(list(piece.tokens))
            positions[row, :size] = places
            columns[row, :size] = places

    def run(self) -> tuple[Tensor, Tensor]:
        """Run the pass: logits [batch, window, head] on its device, tokens [batch, window] here.

        The host waits once, for the tokens.
        """
        self._inputs.copy_(self._host, non_blocking=True)
        logits, tokens = self._replay()
        self._tokens.copy_(tokens, non_blocking=True)
        if self._on_cuda:
            torch.cuda.current_stream(self._inputs.device).synchronize()
        return logits, self._tokens


class Pool:
    """Keys and values of all rows, [rows, kv_heads, length + 1, D] a layer.

    The last column takes what padding writes. A layer's memory is taken when it first writes.
    """

    def __init__(self, num_rows: int, length: int) -> None:
        """Make a pool for ``num_rows`` sessions of up to ``length`` tokens."""
        self.num_rows = num_rows
        self.padding_column = length
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a layer, made for states like these if it is new."""
        if index not in self._layers:
            # Zeros, for what is masked is still multiplied: by 0, which must not meet a NaN.
            self._layers[index] = (self._zeros(keys), self._zeros(values))
        return self._layers[index]

    def copy(self, donor: int, target: int, length: int) -> None:
        """Copy the first ``length`` columns of a row to another."""
        for layer in self._layers.values():
            for part in layer:
                part[target, :, :length] = part[donor, :, :length]

    def _zeros(self, like: Tensor) -> Tensor:
        _, num_heads, _, head_dim = like.shape
        return like.new_zeros(self.num_rows, num_heads, self.padding_column + 1, head_dim)


class PaddedCache(Cache):
    """Writes a pass's keys and values into the pool, and says what its tokens see."""

    def __init__(
        self, pool: Pool, shape: Shape, positions: Tensor, columns: Tensor, num_layers: int
    ) -> None:
        """Write to ``columns`` [batch, window]; a token sees columns up to its position."""
        self._pool = pool
        self._shape = shape
        self._columns = columns[:, None, :, None]
        known = torch.arange(shape.length, device=positions.device)
        self._hidden = known > positions[..., None]  # [batch, window, length]
        self._mask: Tensor | None = None
        layers = [NoLayer() for _ in range(num_layers)]  # type: ignore[no-untyped-call]
        super().__init__(layers=list(layers))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [batch, kv_heads, window, D]; return all columns of the shape's length."""
        keys, values = self._pool.layer(layer_idx, key_states, value_states)
        return self._write(keys, key_states), self._write(values, value_states)

    def mask(self, num_shared: int, dtype: torch.dtype) -> Tensor:
        """Return what to add to scores of ``num_shared`` heads a key, [batch, 1, rows, length]."""
        if self._mask is None:
            mask = torch.zeros(self._hidden.shape, dtype=dtype, device=self._hidden.device)
            mask = mask.masked_fill(self._hidden, float("-inf"))
            self._mask = mask.repeat(1, num_shared, 1)[:, None]
        return self._mask

    def _write(self, rows: Tensor, states: Tensor) -> Tensor:
        rows = rows[: self._shape.batch]
        rows.scatter_(2, self._columns.expand(states.shape), states)
        return rows[:, :, : self._shape.length]


def padded_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    static: PaddedCache,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend to all columns: query [batch, heads, window, D] -> [batch, window, heads, D]."""
    refuse_variants(kwargs)
    batch, num_heads, window, head_dim = query.shape
    num_kv_heads = key.shape[1]
    # Heads that share keys become queries of one head, so that no key is repeated.
    queries = query.reshape(batch, num_kv_heads, -1, head_dim)
    mask = static.mask(num_heads // num_kv_heads, query.dtype)
    output = F.scaled_dot_product_attention(queries, key, value, mask, scale=scaling)
    return output.reshape(batch, num_heads, window, -1).transpose(1, 2), None


def _num_rows(pieces: Sequence[Chunk[int]]) -> int:
    return max(piece.buffer for piece in pieces) + 1


def _smallest(choices: Sequence[int], needed: int) -> int:
    """Return the first choice that is enough; more than the last never comes."""
    return next(choice for choice in choices if choice >= needed)


def _ascending(first: int, last: int, factor: int) -> tuple[int, ...]:
    """Return first, first * factor and so on below ``last``, then ``last``."""
    numbers: list[int] = []
    number = first
    while number < last:
        numbers.append(number)
        number *= factor
    return (*numbers, last)


AttentionInterface.register(ATTENTION, padded_attention)
AttentionMaskInterface.register(ATTENTION, no_mask)
