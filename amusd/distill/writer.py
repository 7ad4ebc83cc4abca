"""Batched text generation that also returns the model's distribution at each token.

Training data and measurements use it; it needs no service. The rows of a batch are padded on the
left and decoded together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  (its name everywhere)
from torch import Tensor
from transformers import PreTrainedModel

from amusd.distill.cut import output_head
from amusd.engine.kv.sequence_cache import SequenceCache

_CANDIDATES = 48  # most likely tokens, whose logits are recomputed in float32
_ENDED_SHARE = 7 / 8  # of the rows; when so many have ended, the others are cut off


@dataclass(frozen=True, slots=True)
class Written:
    """The output of a model for one prompt."""

    prompt: list[int]
    tokens: list[int]  # [n], the stop token included
    top_ids: Tensor  # [n, K] int32, most likely first
    top_logprobs: Tensor  # [n, K] float16, of the full softmax at temperature 1


class TextWriter:
    """Generates text with one model on its device."""

    def __init__(self, model: PreTrainedModel, stop_ids: Sequence[int], top_k: int = 16) -> None:
        """Generate with ``model`` up to a token of ``stop_ids``; return ``top_k`` logprobs."""
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

        Sampling chooses among the 48 most likely tokens. Generation ends when seven rows in eight
        have reached a stop token, and the other rows are cut off there. With ``to_the_end`` it ends
        when all rows have.
        """
        noise = torch.Generator(self._device).manual_seed(seed)
        scale = torch.tensor(temperatures, device=self._device)[:, None]  # [B, 1]
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
            tokens, top_ids, top_logprobs = self._choose(hidden, scale, noise)
            steps.append((tokens.cpu(), top_ids.cpu(), top_logprobs.cpu()))
            done |= torch.isin(tokens, self._stops)
            ids = tokens[:, None]
            mask = F.pad(mask, (0, 1), value=1)
        return self._rows(prompts, steps)

    def _hidden(self, ids: Tensor, mask: Tensor, cache: SequenceCache) -> Tensor:
        """Run ids [B, n] after the cache; mask [B, all columns] -> last hidden state [B, D]."""
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
        self, hidden: Tensor, scale: Tensor, noise: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden [B, D], temperatures [B, 1] -> tokens [B], top ids and logprobs [B, K]."""
        rough = self._head(hidden).float()  # [B, V]
        ids = rough.topk(self._num_candidates, sorted=False).indices
        # 16-bit logits tie often, so the candidates are scored again in float32.
        exact = torch.einsum("bd,bcd->bc", hidden.float(), self._head.weight[ids].float())
        if self._head.bias is not None:
            exact = exact + self._head.bias[ids].float()
        exact, order = exact.sort(descending=True)
        ids = ids.gather(1, order)
        logprobs = exact - rough.logsumexp(-1, keepdim=True)
        # Gumbel-max: the argmax of logits plus noise is a sample.
        gumbel = -torch.empty_like(exact).exponential_(generator=noise).log()
        choice = (exact + scale * gumbel).argmax(-1, keepdim=True)
        tokens = ids.gather(1, choice)[:, 0]
        return tokens, ids[:, : self._top_k].int(), logprobs[:, : self._top_k].half()

    def _rows(
        self, prompts: Sequence[Sequence[int]], steps: list[tuple[Tensor, Tensor, Tensor]]
    ) -> list[Written]:
        """Cut each row after its first stop token."""
        tokens, top_ids, top_logprobs = (torch.stack(part, 1) for part in zip(*steps, strict=True))
        ended = torch.isin(tokens, self._stops.cpu())  # [B, n]
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, tokens.shape[1])
        return [
            Written(list(prompt), tokens[b, :n].tolist(), top_ids[b, :n], top_logprobs[b, :n])
            for b, (prompt, n) in enumerate(zip(prompts, lengths.tolist(), strict=True))
        ]
