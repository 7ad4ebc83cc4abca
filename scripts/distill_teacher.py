"""The verify model as a batch text writer: many rows at once, bfloat16, on a CPU.

A plain Llama forward pass over a KV cache that is allocated once. It exists because generation
with transformers is several times slower on a CPU: there the cache is copied at every token.
Used for training data only; the services run the ordinary float32 model.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (its name everywhere)
from torch import Tensor
from transformers import LlamaForCausalLM

TOP_K = 16  # targets kept per position
CANDIDATES = 48  # tokens whose logits are computed again in float32


@dataclass(frozen=True, slots=True)
class Written:
    """What the teacher wrote after one prompt, with its distribution at each written token."""

    prompt: list[int]
    tokens: list[int]  # [n], the stop token included
    top_ids: Tensor  # [n, TOP_K], int32
    top_logprobs: Tensor  # [n, TOP_K], float16, of the full softmax at temperature 1


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    attention_norm: Tensor
    mlp_norm: Tensor


@dataclass(frozen=True, slots=True)
class _Pass:
    """What all layers of one pass over n new columns share."""

    column: int  # the first new one
    cos: Tensor  # [B, 1, n, 32]
    sin: Tensor  # [B, 1, n, 32]
    mask: Tensor  # [B, 1, n, column + n], true where a query may look

    def rotate(self, x: Tensor) -> Tensor:
        """Apply the rotary embedding to x [B, heads, n, 64]."""
        a, b = x.chunk(2, -1)
        return torch.cat((a * self.cos - b * self.sin, b * self.cos + a * self.sin), -1)


class Teacher:
    """Generates for a batch of prompts; rows are padded on the left so that they end together."""

    def __init__(self, folder: Path) -> None:
        model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = model.config
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._head_dim: int = config.head_dim
        self._eps: float = config.rms_norm_eps
        self._theta: float = config.rope_parameters["rope_theta"]
        self._stops = torch.tensor(model.generation_config.eos_token_id)
        self._embedding = model.model.embed_tokens.weight.detach()  # [V, D] float32
        self._head = self._embedding.bfloat16()
        self._final_norm = model.model.norm.weight.detach()
        self._layers = [
            _Layer(
                qkv=_joined(a.q_proj, a.k_proj, a.v_proj),
                out=_joined(a.o_proj),
                gate_up=_joined(layer.mlp.gate_proj, layer.mlp.up_proj),
                down=_joined(layer.mlp.down_proj),
                attention_norm=layer.input_layernorm.weight.detach(),
                mlp_norm=layer.post_attention_layernorm.weight.detach(),
            )
            for layer in model.model.layers
            for a in (layer.self_attn,)
        ]

    @torch.inference_mode()
    def write(
        self, prompts: list[list[int]], temperatures: list[float], max_tokens: int
    ) -> list[Written]:
        """Continue every prompt by up to `max_tokens`; temperature 0 is greedy.

        Ends early when seven rows in eight have met a stop token; the others are cut there.
        """
        width = max(map(len, prompts))
        start = torch.tensor([width - len(p) for p in prompts])  # [B]
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])  # [B, width]
        cache = self._new_cache(len(prompts), width + max_tokens)
        warmth = torch.tensor(temperatures)
        done = torch.zeros(len(prompts), dtype=torch.bool)
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        column = 0
        while len(steps) < max_tokens and int(done.sum()) * 8 < 7 * len(prompts):
            hidden = self._forward(ids, start, column, cache)
            column += ids.shape[1]
            tokens, top_ids, top_logprobs = self._choose(hidden, warmth)
            steps.append((tokens, top_ids, top_logprobs))
            done |= torch.isin(tokens, self._stops)
            ids = tokens[:, None]
        return self._cut(prompts, steps)

    def _cut(
        self, prompts: list[list[int]], steps: list[tuple[Tensor, Tensor, Tensor]]
    ) -> list[Written]:
        tokens, top_ids, top_logprobs = (torch.stack(part, 1) for part in zip(*steps, strict=True))
        ended = torch.isin(tokens, self._stops)  # [B, n]
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, tokens.shape[1])
        return [
            Written(prompt, tokens[b, :n].tolist(), top_ids[b, :n], top_logprobs[b, :n])
            for b, (prompt, n) in enumerate(zip(prompts, lengths.tolist(), strict=True))
        ]

    def _choose(self, hidden: Tensor, warmth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rough = F.linear(hidden.bfloat16(), self._head).float()  # [B, V]
        ids = rough.topk(CANDIDATES, sorted=False).indices
        # bfloat16 logits tie often; the candidates are scored again in float32.
        exact = torch.einsum("bd,bcd->bc", hidden, self._embedding[ids])
        exact, order = exact.sort(descending=True)
        ids = ids.gather(1, order)
        logprobs = exact - rough.logsumexp(-1, keepdim=True)
        noise = -torch.empty_like(exact).exponential_().log()
        choice = (exact + warmth[:, None] * noise).argmax(-1, keepdim=True)
        tokens = ids.gather(1, choice)[:, 0]
        return tokens, ids[:, :TOP_K].int(), logprobs[:, :TOP_K].half()

    def _new_cache(self, rows: int, columns: int) -> Tensor:
        shape = (len(self._layers), 2, rows, self._kv_heads, columns, self._head_dim)
        return torch.zeros(shape, dtype=torch.bfloat16)

    def _forward(self, ids: Tensor, start: Tensor, column: int, cache: Tensor) -> Tensor:
        """ids [B, n] at columns [column, column + n) -> last hidden state [B, D] float32."""
        now = self._new_pass(start, column, ids.shape[1])
        x = self._embedding[ids]
        for layer, kv in zip(self._layers, cache, strict=True):
            x = x + self._attend(layer, x, now, kv)
            gate, up = F.linear(self._norm(x, layer.mlp_norm), layer.gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        return F.rms_norm(x[:, -1], x.shape[-1:], self._final_norm, self._eps)

    def _new_pass(self, start: Tensor, column: int, n: int) -> _Pass:
        columns = torch.arange(column + n)
        queries = columns[column:]
        positions = (queries - start[:, None]).clamp(min=0)  # [B, n]
        exponent = torch.arange(0, self._head_dim, 2) / self._head_dim
        angles = positions[:, None, :, None] * self._theta**-exponent  # [B, 1, n, 32]
        seen = (columns >= start[:, None, None]) & (columns <= queries[:, None])
        # A query in the padding would see nothing at all, so its own column is always visible.
        mask = (seen | (columns == queries[:, None]))[:, None]
        return _Pass(column, angles.cos().bfloat16(), angles.sin().bfloat16(), mask)

    def _attend(self, layer: _Layer, x: Tensor, now: _Pass, kv: Tensor) -> Tensor:
        rows, n, _ = x.shape
        end = now.column + n
        qkv = F.linear(self._norm(x, layer.attention_norm), layer.qkv)
        qkv = qkv.view(rows, n, -1, self._head_dim).transpose(1, 2)  # [B, H + 2 KV, n, 64]
        q, k, v = torch.split(qkv, [self._heads, self._kv_heads, self._kv_heads], 1)
        kv[0, :, :, now.column : end] = now.rotate(k)
        kv[1, :, :, now.column : end] = v
        keys, values = kv[:, :, :, :end]
        q = now.rotate(q)
        if n > 1:
            out = F.scaled_dot_product_attention(q, keys, values, now.mask, enable_gqa=True)
            return F.linear(out.transpose(1, 2).reshape(rows, n, -1), layer.out)
        # The heads that share a key become its queries, so that nothing is repeated.
        q = q.view(rows, self._kv_heads, -1, self._head_dim)
        out = F.scaled_dot_product_attention(q, keys, values, now.mask)
        return F.linear(out.reshape(rows, 1, -1), layer.out)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self._eps).bfloat16()


def _joined(*linears: torch.nn.Linear) -> Tensor:
    return torch.cat([linear.weight.detach() for linear in linears]).bfloat16()
