"""One session a pass, with a cache of its own: what every model can do that can be served."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from amusd.engine.kv.sequence_cache import CopyingCache, SequenceCache
from amusd.engine.runners.runner import Chunk
from amusd.engine.sampling.sampler import GREEDY, Sampler

SessionCache = SequenceCache | CopyingCache


class UnbatchedRunner:
    """Runs each piece in a pass of its own, in the model's own way of attention."""

    def __init__(
        self, model: PreTrainedModel, sampler: Sampler = GREEDY, growing: bool = False
    ) -> None:
        """Run ``model``; ``growing``: with the cache of Transformers, which copies at each pass."""
        self.model = model
        self._sampler = sampler
        self.growing = growing
        self._num_layers = int(model.config.get_text_config().num_hidden_layers)

    def make(self, capacity: int) -> SessionCache:
        """Return an empty cache."""
        if self.growing:
            return CopyingCache(config=self.model.config)
        return SequenceCache(self._num_layers, capacity)

    def copy(self, donor: SessionCache, target: SessionCache, length: int) -> None:
        """Copy rows; growing caches are never asked to."""
        assert isinstance(donor, SequenceCache)
        assert isinstance(target, SequenceCache)
        target.copy_rows(donor, length)

    def drop(self, buffer: SessionCache) -> None:
        """Nothing to do: a cache goes with its last reference."""

    def logits(self, pieces: Sequence[Chunk[SessionCache]]) -> Tensor:
        """Return the logits of all outputs, [outputs, head]."""
        return torch.cat([self._run(piece) for piece in pieces])

    def tokens(self, pieces: Sequence[Chunk[SessionCache]]) -> list[int]:
        """Return the greedy tokens of all outputs."""
        tokens: list[int] = self._sampler.sample(self.logits(pieces)).tolist()
        return tokens

    def _run(self, piece: Chunk[SessionCache]) -> Tensor:
        piece.buffer.truncate(piece.start)
        logits: Tensor = self.model(
            input_ids=torch.tensor([list(piece.tokens)], device=self.model.device),
            past_key_values=piece.buffer,
            use_cache=True,
            logits_to_keep=max(1, piece.num_outputs),  # some models refuse to make none
        ).logits[0]
        return logits[len(logits) - piece.num_outputs :]


def bytes_per_token(passes: UnbatchedRunner) -> int:
    """Return what the keys and values of one token take in all layers, by running one."""
    cache = passes.make(1)
    passes.logits([Chunk(cache, 0, [0], 1)])
    num_bytes = 0
    for layer in cache.layers:  # some hold nothing, for they use another one's
        for part in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            num_bytes += 0 if part is None else int(part.nbytes)
    return max(1, num_bytes)
