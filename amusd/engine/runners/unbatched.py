"""The unbatched runner: one sequence a forward pass. It runs every model that can be served."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from amusd.engine.kv.sequence_cache import CopyingCache, SequenceCache
from amusd.engine.runners.runner import Chunk, rows_of
from amusd.engine.sampling.reference_sampler import Sampled
from amusd.engine.sampling.sampler import GREEDY, Ranking, Sampler

AnyCache = SequenceCache | CopyingCache


class UnbatchedRunner:
    """Runs each chunk in a forward pass of its own, with the model's own attention."""

    name = "unbatched"

    def __init__(
        self, model: PreTrainedModel, sampler: Sampler = GREEDY, copying_cache: bool = False
    ) -> None:
        """Run ``model``. ``copying_cache``: with the cache of Transformers, for any model."""
        self._model = model
        self._sampler = sampler
        self.copying_cache = copying_cache
        self._num_layers = int(model.config.get_text_config().num_hidden_layers)

    def allocate(self, capacity: int) -> AnyCache:
        """Return an empty cache."""
        if self.copying_cache:
            return CopyingCache(config=self._model.config)
        return SequenceCache(self._num_layers, capacity)

    @torch.inference_mode()
    def copy(self, donor: AnyCache, target: AnyCache, length: int) -> None:
        """Copy the first ``length`` tokens. A ``CopyingCache`` does not support it."""
        assert isinstance(donor, SequenceCache)
        assert isinstance(target, SequenceCache)
        target.copy_prefix(donor, length)

    def free(self, buffer: AnyCache) -> None:
        """Do nothing: a cache is freed with its last reference."""

    @torch.inference_mode()
    def logits(self, batch: Sequence[Chunk[AnyCache]]) -> Tensor:
        """Return the logits of all outputs, [outputs, head]."""
        return torch.cat([self._run(chunk) for chunk in batch])

    @torch.inference_mode()
    def tokens(self, batch: Sequence[Chunk[AnyCache]]) -> list[int]:
        """Return the sampled tokens of all outputs."""
        tokens: list[int] = self._sampler.sample(self.logits(batch)).tolist()
        return tokens

    @torch.inference_mode()
    def rankings(self, batch: Sequence[Chunk[AnyCache]]) -> list[Ranking]:
        """Return the sampled and the next-best tokens of all outputs."""
        return self._sampler.rankings(self._sampler.rank(self.logits(batch)))

    @torch.inference_mode()
    def sample(self, batch: Sequence[Chunk[AnyCache]]) -> list[Sampled]:
        """Sample all outputs as the rows of their chunks say."""
        return self._sampler.sample_rows(self.logits(batch), rows_of(batch))

    def _run(self, chunk: Chunk[AnyCache]) -> Tensor:
        chunk.buffer.truncate(chunk.start)
        logits: Tensor = self._model(
            input_ids=torch.tensor([list(chunk.tokens)], device=self._model.device),
            past_key_values=chunk.buffer,
            use_cache=True,
            logits_to_keep=max(1, chunk.num_outputs),  # some models refuse to compute none
        ).logits[0]
        return logits[len(logits) - chunk.num_outputs :]


def bytes_per_token(runner: UnbatchedRunner) -> int:
    """Return the bytes of one token's keys and values in all layers, measured by running one."""
    cache = runner.allocate(1)
    runner.logits([Chunk(cache, 0, [0], 1)])
    num_bytes = 0
    for layer in cache.layers:  # a layer that uses another one's keys has no tensors
        for part in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            num_bytes += 0 if part is None else int(part.nbytes)
    return max(1, num_bytes)
