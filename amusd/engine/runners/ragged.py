"""The ragged runner: the tokens of all sequences in one forward pass, without padding.

Everything but attention treats tokens alike, so the tokens of all sequences share each matrix
product. Attention goes sequence by sequence over that sequence's own keys and values.

Exact passes have a fixed number of tokens, padding included, and attend token by token. So every
matrix product has the same shape for any batch, and the shape of a token's attention depends on
its position alone. The self-check makes sure that a row of a product does not depend on its place
or on the other rows. Then a token's bits depend on the tokens before it and on nothing else.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from amusd.engine.kv.sequence_cache import SequenceCache
from amusd.engine.runners.batch_splitting import PassLimits, run_split
from amusd.engine.runners.ragged_attention import RAGGED_ATTENTION, RaggedCache
from amusd.engine.runners.runner import Chunk, rows_of
from amusd.engine.runners.transformers_hooks import attention
from amusd.engine.sampling.reference_sampler import Sampled
from amusd.engine.sampling.sampler import GREEDY, Ranking, Sampler

_EXACT_TOKENS = 8
_EXACT_TOKENS_BFLOAT16 = 16


def exact_pass_tokens(dtype: torch.dtype) -> int:
    """Return the tokens of an exact pass on CPU, filled from any sequences.

    Padding is computed like tokens, so a single token pays for the whole pass. In float32, 8
    tokens take twice the time of one in a model of 135 M parameters, 16 take three times, and a
    verify pass seldom has more. In bfloat16, 16 tokens take hardly longer than one where the
    processor has AMX, and prefill takes half the time that it takes with 8.
    """
    return _EXACT_TOKENS_BFLOAT16 if dtype is torch.bfloat16 else _EXACT_TOKENS


class RaggedRunner:
    """Runs the chunks of a batch in one row of tokens."""

    name = "ragged"

    def __init__(
        self, model: PreTrainedModel, sampler: Sampler = GREEDY, pass_tokens: int = 0
    ) -> None:
        """Run ``model``. With ``pass_tokens``, all passes are exact and have that many tokens."""
        self._model = model
        self._sampler = sampler
        self._pass_tokens = pass_tokens
        self._num_layers = int(model.config.get_text_config().num_hidden_layers)

    def allocate(self, capacity: int) -> SequenceCache:
        """Return an empty cache."""
        return SequenceCache(self._num_layers, capacity)

    @torch.inference_mode()
    def copy(self, donor: SequenceCache, target: SequenceCache, length: int) -> None:
        """Copy the first ``length`` tokens."""
        target.copy_prefix(donor, length)

    def free(self, buffer: SequenceCache) -> None:
        """Do nothing: a cache is freed with its last reference."""

    @torch.inference_mode()
    def logits(self, batch: Sequence[Chunk[SequenceCache]]) -> Tensor:
        """Return the logits of all outputs, [outputs, head]."""
        if not self._pass_tokens:
            return self._run(batch)
        most = self._pass_tokens
        return run_split(batch, PassLimits(most, most, most), self._run)

    @torch.inference_mode()
    def tokens(self, batch: Sequence[Chunk[SequenceCache]]) -> list[int]:
        """Return the sampled tokens of all outputs."""
        tokens: list[int] = self._sampler.sample(self.logits(batch)).tolist()
        return tokens

    @torch.inference_mode()
    def rankings(self, batch: Sequence[Chunk[SequenceCache]]) -> list[Ranking]:
        """Return the sampled and the next-best tokens of all outputs."""
        return self._sampler.rankings(self._sampler.rank(self.logits(batch)))

    @torch.inference_mode()
    def sample(self, batch: Sequence[Chunk[SequenceCache]]) -> list[Sampled]:
        """Sample all outputs as the rows of their chunks say."""
        return self._sampler.sample_rows(self.logits(batch), rows_of(batch))

    def _run(self, batch: Sequence[Chunk[SequenceCache]]) -> Tensor:
        """Run one pass; return the logits of its outputs, [outputs, head]."""
        for chunk in batch:
            chunk.buffer.truncate(chunk.start)
        tokens = [token for chunk in batch for token in chunk.tokens]
        positions = [
            position
            for chunk in batch
            for position in range(chunk.start, chunk.start + len(chunk.tokens))
        ]
        padding = [0] * max(0, self._pass_tokens - len(tokens))
        cache = RaggedCache(batch, len(padding), self._num_layers, self._pass_tokens > 0)
        outputs = list(_output_indices(batch))
        with attention(self._model, RAGGED_ATTENTION):
            logits: Tensor = self._model(
                input_ids=self._ids([*tokens, *padding]),
                position_ids=self._ids([*positions, *padding]),
                past_key_values=cache,
                ragged=cache,
                use_cache=True,
                logits_to_keep=self._logits_to_keep(outputs),
            ).logits[0]
        return logits[outputs] if self._pass_tokens and outputs else logits[: len(outputs)]

    def _logits_to_keep(self, outputs: list[int]) -> Tensor | int:
        """Return for which tokens the model computes logits."""
        if not outputs:
            return 1  # some models refuse to compute none
        if self._pass_tokens:
            return 0  # all of them, so that the head's product keeps its shape
        return torch.tensor(outputs, device=self._model.device)

    def _ids(self, numbers: list[int]) -> Tensor:
        return torch.tensor([numbers], device=self._model.device)


def _output_indices(batch: Sequence[Chunk[SequenceCache]]) -> Iterator[int]:
    """Yield the index of each token of the pass that has an output."""
    end = 0
    for chunk in batch:
        end += len(chunk.tokens)
        yield from range(end - chunk.num_outputs, end)
