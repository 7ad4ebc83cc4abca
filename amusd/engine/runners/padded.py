"""The padded runner: forward passes of few fixed shapes over a KV pool, for CUDA graphs.

Row i of a pass is row i of the pool, and a sequence has a row while it is open. A row has up to
``query_length`` tokens and the rest is padding, so the same few shapes repeat and can be captured
as CUDA graphs. Padding is written to a column that attention never reads, and the columns after a
token are masked.

With numerics fast a pass has the smallest shape that fits. With numerics exact all passes have
the same shape. The tests run all of this on CPU, except graphs and pinned memory.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from amusd.engine.interface import NO_TOKEN
from amusd.engine.kv.padded_pool import PaddedPool
from amusd.engine.runners.batch_splitting import PassLimits, run_split
from amusd.engine.runners.graph_capture import Capture, Replay, direct
from amusd.engine.runners.padded_attention import PADDED_ATTENTION, PaddedCache
from amusd.engine.runners.runner import Chunk, rows_of
from amusd.engine.runners.shape_buckets import MAX_PASS_TOKENS, Buckets, Shape
from amusd.engine.runners.transformers_hooks import attention
from amusd.engine.sampling.reference_sampler import Sampled
from amusd.engine.sampling.sampler import GREEDY, Ranking, Sampler


class PaddedRunner:
    """Runs batches in passes of fixed shapes. A buffer is the number of a row of the pool."""

    name = "padded"

    def __init__(
        self,
        model: PreTrainedModel,
        buckets: Buckets,
        sampler: Sampler = GREEDY,
        capture: Capture = direct,
    ) -> None:
        """Run ``model``. A shape is captured at its first use, or by ``warm_up``."""
        self._model = model
        self._sampler = sampler
        self._buckets = buckets
        self._capture = capture
        self._num_layers = int(model.config.get_text_config().num_hidden_layers)
        self._pool = PaddedPool(buckets.batches[-1], buckets.kv_lengths[-1])
        self._free = list(range(self._pool.num_rows))
        self._suspect: set[int] = set()  # rows that may hold NaN
        self._programs: dict[Shape, _Program] = {}
        self._logits: Tensor | None = None  # [tokens of the largest shape, head]

    @property
    def num_rows(self) -> int:
        """Most sequences that are open at a time."""
        return self._pool.num_rows

    def allocate(self, capacity: int) -> int:
        """Return the lowest free row, because a pass has all rows up to the highest one."""
        row = min(self._free)
        self._free.remove(row)
        return row

    @torch.inference_mode()
    def copy(self, donor: int, target: int, length: int) -> None:
        """Copy the first ``length`` columns."""
        self._pool.copy(donor, target, length)

    @torch.inference_mode()
    def free(self, buffer: int) -> None:
        """Free the row."""
        if buffer in self._suspect:
            self._pool.clear(buffer)
            self._suspect.remove(buffer)
        self._free.append(buffer)

    @torch.inference_mode()
    def logits(self, batch: Sequence[Chunk[int]]) -> Tensor:
        """Return the logits of all outputs, [outputs, head]."""
        return self._run_all(batch, _Program.logits)

    @torch.inference_mode()
    def tokens(self, batch: Sequence[Chunk[int]]) -> list[int]:
        """Return the sampled tokens of all outputs."""
        ranked = self._run_all(batch, _Program.ranked)
        tokens: list[int] = ranked[:, 0].tolist()
        self._clear_broken(batch, tokens)
        return tokens

    @torch.inference_mode()
    def rankings(self, batch: Sequence[Chunk[int]]) -> list[Ranking]:
        """Return the sampled and the next-best tokens of all outputs."""
        ranked = self._run_all(batch, _Program.ranked)
        self._clear_broken(batch, ranked[:, 0].tolist())
        return self._sampler.rankings(ranked)

    @torch.inference_mode()
    def sample(self, batch: Sequence[Chunk[int]]) -> list[Sampled]:
        """Sample all outputs as the rows of their chunks say, behind the captured passes."""
        found = self._sampler.sample_rows(self.logits(batch), rows_of(batch))
        self._clear_broken(batch, [one.tokens[0] for one in found])
        return found

    def _clear_broken(self, batch: Sequence[Chunk[int]], tokens: Sequence[int]) -> None:
        """Clear the columns from the first output without a token on.

        Attention multiplies masked values by 0, and 0 times NaN is NaN. So columns that were
        rolled back, or belonged to an earlier sequence, must not hold it. A row whose chunks had
        no output yet may hold some unseen.
        """
        end = 0
        for chunk in batch:
            found, end = tokens[end : end + chunk.num_outputs], end + chunk.num_outputs
            if chunk.num_outputs and NO_TOKEN not in found:
                self._suspect.discard(chunk.buffer)
                continue
            self._suspect.add(chunk.buffer)
            if found:
                after = chunk.start + len(chunk.tokens)
                first = after - chunk.num_outputs + found.index(NO_TOKEN)
                self._pool.clear(chunk.buffer, first, after)

    @torch.inference_mode()
    def warm_up(self) -> int:
        """Capture all shapes, so that no session waits for one; return their number."""
        shapes = self._buckets.shapes()
        for shape in shapes:
            self._program(shape)
        return len(shapes)

    def _run_all(self, batch: Sequence[Chunk[int]], run: "Callable[[_Program], Tensor]") -> Tensor:
        num_rows = self._buckets.fit(_num_rows(batch), 1, 1).batch
        limits = PassLimits(MAX_PASS_TOKENS, self._buckets.query_limit(num_rows), num_rows)
        return run_split(batch, limits, lambda parts: self._run(parts, run))

    def _run(self, batch: Sequence[Chunk[int]], run: "Callable[[_Program], Tensor]") -> Tensor:
        """Run one pass; return the outputs' part of the result of ``run`` [batch, query, ...]."""
        shape = self._buckets.fit(
            batch=_num_rows(batch),
            query_length=max(len(chunk.tokens) for chunk in batch),
            kv_length=max(chunk.start + len(chunk.tokens) for chunk in batch),
        )
        program = self._program(shape)
        program.fill(batch)
        found = run(program)
        places = [
            (chunk.buffer, index)
            for chunk in batch
            for index in range(len(chunk.tokens) - chunk.num_outputs, len(chunk.tokens))
        ]
        at = torch.tensor(places, dtype=torch.int64).view(-1, 2)
        at = at.to(found.device, non_blocking=True)  # the host does not wait for the pass
        return found[at[:, 0], at[:, 1]]

    def _program(self, shape: Shape) -> "_Program":
        if shape not in self._programs:
            self._programs[shape] = _Program(
                shape, self._pool, self._model.device, self._capture, self._forward
            )
        return self._programs[shape]

    def _forward(self, shape: Shape, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Run the model and the sampler on inputs [3, batch, query]: the captured function."""
        ids, positions, columns = inputs
        cache = PaddedCache(self._pool, shape, positions, columns, self._num_layers)
        with attention(self._model, PADDED_ATTENTION):
            logits: Tensor = self._model(
                input_ids=ids,
                position_ids=positions,
                past_key_values=cache,
                padded=cache,
                use_cache=True,
            ).logits  # [batch, query, head]
        return self._keep(logits), self._sampler.rank(logits)

    def _keep(self, logits: Tensor) -> Tensor:
        """Copy logits to memory that all shapes share. Each graph would hold its own otherwise."""
        batch, query_length, head_size = logits.shape
        if self._logits is None:
            most = max(shape.batch * shape.query_length for shape in self._buckets.shapes())
            self._logits = logits.new_empty(most, head_size)
        return self._logits[: batch * query_length].view(logits.shape).copy_(logits)


class _Program:
    """A pass of one shape, ready to run: its inputs on host and device, and the captured call."""

    def __init__(
        self,
        shape: Shape,
        pool: PaddedPool,
        device: torch.device,
        capture: Capture,
        forward: Callable[[Shape, Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        self._padding_column = pool.padding_column
        self._on_cuda = device.type == "cuda"
        size = (3, shape.batch, shape.query_length)  # ids, positions, columns of the pool
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=self._on_cuda)
        self._inputs = torch.zeros(size, dtype=torch.int64, device=device)
        self._inputs[2] = pool.padding_column
        self._copied: torch.cuda.Event | None = None  # the host's inputs may change after it
        if self._on_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._ranked: Tensor | None = None  # on the host
        self._replay: Replay = capture(functools.partial(forward, shape), self._inputs)

    def fill(self, batch: Sequence[Chunk[int]]) -> None:
        """Write the tokens of the batch, and padding everywhere else, to the host's inputs."""
        if self._copied is not None:
            self._copied.synchronize()
        ids, positions, columns = self._host
        ids.zero_()
        positions.zero_()  # position 0 exists in every model, and sees column 0 only
        columns.fill_(self._padding_column)
        for chunk in batch:
            size, row = len(chunk.tokens), chunk.buffer
            places = torch.arange(chunk.start, chunk.start + size)
            ids[row, :size] = torch.tensor(list(chunk.tokens))
            positions[row, :size] = places
            columns[row, :size] = places

    def logits(self) -> Tensor:
        """Run the pass; return its logits [batch, query, head], valid until the next pass.

        The host does not wait.
        """
        return self._start()[0]

    def ranked(self) -> Tensor:
        """Run the pass; return what ``Sampler.rank`` says of each token, [batch, query, columns].

        The result is on the host, which waits once.
        """
        ranked = self._start()[1]
        if self._ranked is None:
            self._ranked = torch.empty(ranked.shape, dtype=ranked.dtype, pin_memory=self._on_cuda)
        self._ranked.copy_(ranked, non_blocking=True)
        if self._on_cuda:
            torch.cuda.current_stream(self._inputs.device).synchronize()
        return self._ranked

    def _start(self) -> tuple[Tensor, Tensor]:
        """Start the pass; return logits and ranking of each token, on the device."""
        self._inputs.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return self._replay()


def _num_rows(batch: Sequence[Chunk[int]]) -> int:
    """Return how many rows a pass needs: all up to the highest row of the batch."""
    return max(chunk.buffer for chunk in batch) + 1
