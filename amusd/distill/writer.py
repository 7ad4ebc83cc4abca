"""A model that writes text after many prompts at once, and tells its distribution at each token.

Used for training data and for measurements, where no service is needed: the rows of a batch go on
together, padded on the left so that they end together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  (its name everywhere)
from torch import Tensor
from transformers import PreTrainedModel

from amusd.distill.cut import output_head
from amusd.engine.kv.sequence_cache import SequenceCache

_CANDIDATES = 48  # likeliest tokens, whose logits are computed again in float32
_ENDED_SHARE = 7 / 8  # of the rows, after which the others are cut


@dataclass(frozen=True, slots=True)
class Written:
    """What a model wrote after one prompt."""

    prompt: list[int]
    tokens: list[int]  # [n], the stop token included
    top_ids: Tensor  # [n, K] int32, likeliest first
    top_logprobs: Tensor  # [n, K] float16, of the full softmax at temperature 1


class TextWriter:
    """Writes with one model on its device."""

    def __init__(self, model: PreTrainedModel, stop_ids: Sequence[int], top_k: int = 16) -> None:
        """Write with ``model`` up to one of ``stop_ids``; keep ``top_k`` likeliest tokens."""
        self._model = model
        self._device = model.device
        self._stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=self._device)
        self._num_layers = int(model.config.get_text_config().num_hidden_layers)
        self._head = output_head(model)
        num_tokens = self._head.weight.shape[0]
        self._top_k = min(top_k, num_tokens)
        self._num_candidates = min(max(_CANDIDATES, top_k), num_tokens)

    @torch.inference_mode()
    def write(
        self,
        prompts: Sequence[Sequence[int]],
        temperatures: Sequence[float],
        max_tokens: int,
        seed: int,
        to_the_end: bool = False,
    ) -> list[Written]:
        """Continue every prompt by up to ``max_tokens``; temperature 0 is greedy.

        Sampled tokens come from the 48 likeliest. Ends early when seven rows in eight have met a
        stop token, the others are cut there; with ``to_the_end`` when all have.
        """
        noise = torch.Generator(self._device).manual_seed(seed)
        warmth = torch.tensor(temperatures, device=self._device)[:, None]  # [B, 1]
        width = max(map(len, prompts))
        mask = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._device
        )
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        ids = ids.to(self._device)  # [B, width]
        cache = SequenceCache(self._num_layers, width + max_tokens)
        done = torch.zeros(len(prompts), dtype=torch.bool, device=self._device)
        enough = len(prompts) * (1.0 if to_the_end else _ENDED_SHARE)
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        while len(steps) < max_tokens and int(done.sum()) < enough:
            hidden = self._hidden(ids, mask, cache)
            tokens, top_ids, top_logprobs = self._choose(hidden, warmth, noise)
            steps.append((tokens.cpu(), top_ids.cpu(), top_logprobs.cpu()))
            done |= torch.isin(tokens, self._stops)
            ids = tokens[:, None]
            mask = F.pad(mask, (0, 1), value=1)
        return self._rows(prompts, steps)

    def _hidden(self, ids: Tensor, mask: Tensor, cache: SequenceCache) -> Tensor:
        """Run ids [B, n] behind the cache; mask [B, all columns] -> last hidden state [B, D]."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        states = self._model.base_model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        last: Tensor = states[:, -1]
        return last

    def _choose(
        self, hidden: Tensor, warmth: Tensor, noise: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden [B, D], temperatures [B, 1] -> tokens [B], top ids and logprobs [B, K]."""
        rough = self._head(hidden).float()  # [B, V]
        ids = rough.topk(self._num_candidates, sorted=False).indices
        # Logits of 16 bits tie often, so the candidates are scored again in float32.
        exact = torch.einsum("bd,bcd->bc", hidden.float(), self._head.weight[ids].float())
        if self._head.bias is not None:
            exact = exact + self._head.bias[ids].float()
        exact, order = exact.sort(descending=True)
        ids = ids.gather(1, order)
        logprobs = exact - rough.logsumexp(-1, keepdim=True)
        # Gumbel-max: the argmax of logits and noise is a sample.
        gumbel = -torch.empty_like(exact).exponential_(generator=noise).log()
        choice = (exact + warmth * gumbel).argmax(-1, keepdim=True)
        tokens = ids.gather(1, choice)[:, 0]
        return tokens, ids[:, : self._top_k].int(), logprobs[:, : self._top_k].half()

    def _rows(
        self, prompts: Sequence[Sequence[int]], steps: list[tuple[Tensor, Tensor, Tensor]]
    ) -> list[Written]:
        """Cut each row behind its first stop token."""
        tokens, top_ids, top_logprobs = (torch.stack(part, 1) for part in zip(*steps, strict=True))
        ended = torch.isin(tokens, self._stops.cpu())  # [B, n]
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, tokens.shape[1])
        return [
            Written(list(prompt), tokens[b, :n].tolist(), top_ids[b, :n], top_logprobs[b, :n])
            for b, (prompt, n) in enumerate(zip(prompts, lengths.tolist(), strict=True))
        ]
