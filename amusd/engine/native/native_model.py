"""A Llama-like model of Transformers, converted to the form of the native engine."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from amusd.engine.interface import WeightFormat
from amusd.engine.native.library import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    LANES,
    Layer,
    Model,
    library,
    unavailable_reason,
)
from amusd.engine.native.packed_weights import FORMAT_NAMES, Arena, Packed, pack

_FAMILIES = {f"{family}ForCausalLM": family for family in ("Llama", "Mistral", "Qwen2", "Qwen3")}
_DYNAMIC_ROPE = ("dynamic", "longrope")  # angles that depend on the length of the sequence
_TABLE_BLOCK = 1 << 13  # positions whose angles are computed at once
_MATRICES = 4  # of a layer: those with the same input are joined
_EMBEDDING_FORMATS = {
    torch.float32: FLOAT32,
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
}


class NativeModel:
    """The weights of a model in an arena, and the C structures that point to them."""

    def __init__(
        self,
        model: PreTrainedModel,
        weights: WeightFormat,
        num_outputs: int | None = None,
        context_length: int | None = None,
    ) -> None:
        """Convert ``model``, which is not needed afterwards.

        Args:
            model: a model for which ``reason_against`` returns None.
            weights: how to store the weights.
            num_outputs: only the first ``num_outputs`` rows of the head are computed.
            context_length: positions that the tables cover; None: those of the configuration.
        """
        self.functions: Any = library()
        self.family = _FAMILIES[type(model).__name__]
        self._is_lossy = weights is WeightFormat.INT8
        config: Any = model.config
        body: Any = model.base_model
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        attention = body.layers[0].self_attn
        self.hidden = int(config.hidden_size)
        self.intermediate = int(config.intermediate_size)
        self.num_heads = int(config.num_attention_heads)
        self.num_kv_heads = int(config.num_key_value_heads)
        self.head_dim = int(attention.head_dim)
        num_rows = int(head.weight.shape[0])
        self.num_outputs = min(num_outputs or num_rows, num_rows)
        self._num_layers = len(body.layers)
        self._embedding = _smallest(body.embed_tokens.weight.detach())  # [vocabulary, hidden]
        with torch.inference_mode():
            self._norms = [_norms(layer) for layer in body.layers]
            self._last_norm = _row(body.norm.weight)
            self._cos, self._sin = _rotations(
                body, context_length or int(config.max_position_embeddings)
            )
            parts = [part for layer in body.layers for part in self._pack_layer(layer, weights)]
            parts.append(pack(head.weight, head.bias, weights, self.functions))
            self._arena = Arena(parts)
        self.vocabulary = len(self._embedding)
        self._layers = self._layer_array()
        self.structure = Model(
            layers=self._layers,
            embedding=self._embedding.data_ptr(),
            norm=self._last_norm.data_ptr(),
            cos=self._cos.data_ptr(),
            sin=self._sin.data_ptr(),
            head=self._arena.matrices[-1],
            vocabulary=self.vocabulary,
            embedding_format=_EMBEDDING_FORMATS[self._embedding.dtype],
            num_layers=self._num_layers,
            hidden=self.hidden,
            intermediate=self.intermediate,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            num_outputs=self.num_outputs,
            eps=float(config.rms_norm_eps),
            scale=float(attention.scaling),
        )
        self.address = ctypes.addressof(self.structure)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a forward pass reads."""
        return self._arena.num_bytes

    @property
    def weight_format(self) -> str:
        """The formats of the weights."""
        formats = ", ".join(sorted({FORMAT_NAMES[one.format] for one in self._arena.matrices}))
        is_smaller = formats != FORMAT_NAMES[0]
        return f"{formats} without loss" if is_smaller and not self._is_lossy else formats

    @property
    def num_key_rows(self) -> int:
        """Number of key vectors of one token, in all layers and heads."""
        return self._num_layers * self.num_kv_heads

    def _pack_layer(self, layer: Any, weights: WeightFormat) -> list[Packed]:
        attention, mlp = layer.self_attn, layer.mlp
        groups = (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        )
        return [
            pack(_joined(group), _joined_bias(group), weights, self.functions) for group in groups
        ]

    def _layer_array(self) -> Any:
        layers = (Layer * self._num_layers)()
        for index, layer in enumerate(layers):
            first = index * _MATRICES
            layer.qkv, layer.out, layer.gate_up, layer.down = self._arena.matrices[
                first : first + _MATRICES
            ]
            for name, norm in self._norms[index].items():
                setattr(layer, name, norm.data_ptr())
        return layers


def reason_against(model: PreTrainedModel) -> str | None:
    """Return why the native engine cannot run ``model``; None if it can."""
    if (reason := unavailable_reason()) is not None:
        return reason
    if model.device.type != "cpu" or model.dtype is not torch.float32:
        dtype = str(model.dtype).removeprefix("torch.")
        return f"it computes float32 on CPU, not {dtype} on {model.device}"
    if type(model).__name__ not in _FAMILIES:
        return f"it knows the families {', '.join(_FAMILIES.values())}, not {type(model).__name__}"
    return _reason_against_shape(model.config, model.base_model)


def bytes_per_token(model: PreTrainedModel) -> int:
    """Return the bytes of one token's keys and values, of a model that the engine can run."""
    body: Any = model.base_model
    head_dim = int(body.layers[0].self_attn.head_dim)
    return 2 * 4 * len(body.layers) * int(model.config.num_key_value_heads) * head_dim


def _reason_against_shape(config: Any, body: Any) -> str | None:
    """Return why the native engine cannot run a model of one of its families; None if it can."""
    widths = (config.hidden_size, config.intermediate_size, body.layers[0].self_attn.head_dim)
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) if kinds is None else None
    unknown = {
        f"activation {config.hidden_act}": config.hidden_act != "silu",
        f"sizes that are not multiples of {LANES}": any(width % LANES for width in widths),
        "sliding windows": bool(window) or any(kind != "full_attention" for kind in kinds or ()),
        f"rotary embeddings of type {body.rotary_emb.rope_type}": body.rotary_emb.rope_type
        in _DYNAMIC_ROPE,
    }
    return next((f"it does not support {what}" for what, is_so in unknown.items() if is_so), None)


def _joined(modules: Sequence[nn.Linear]) -> Tensor:
    return torch.cat([module.weight.detach() for module in modules])


def _joined_bias(modules: Sequence[nn.Linear]) -> Tensor | None:
    if all(module.bias is None for module in modules):
        return None
    return torch.cat(
        [
            torch.zeros(module.out_features) if module.bias is None else module.bias.detach()
            for module in modules
        ]
    )


def _row(weight: Tensor) -> Tensor:
    return weight.detach().float().clone().contiguous()


def _norms(layer: Any) -> dict[str, Tensor]:
    found = {
        "input_norm": _row(layer.input_layernorm.weight),
        "post_norm": _row(layer.post_attention_layernorm.weight),
    }
    if hasattr(layer.self_attn, "q_norm"):
        found["query_norm"] = _row(layer.self_attn.q_norm.weight)
        found["key_norm"] = _row(layer.self_attn.k_norm.weight)
    return found


def _rotations(body: Any, num_positions: int) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of each position's angles, [positions, head_dim / 2] each.

    They are computed in blocks, because the model's own code takes several times their memory.
    """
    like = torch.empty(1, dtype=torch.float32)
    half = body.rotary_emb(like, torch.zeros(1, 1, dtype=torch.int64))[0].shape[-1] // 2
    tables = torch.empty(num_positions, half), torch.empty(num_positions, half)
    for start in range(0, num_positions, _TABLE_BLOCK):
        positions = torch.arange(start, min(start + _TABLE_BLOCK, num_positions))[None]
        for table, found in zip(tables, body.rotary_emb(like, positions), strict=True):
            table[start : start + positions.shape[1]] = found[0, :, :half]
    return tables


def _smallest(table: Tensor) -> Tensor:
    """Return the embeddings in the smallest lossless dtype, contiguous."""
    for dtype in (torch.bfloat16, torch.float16):
        smaller = table.to(dtype)
        if torch.equal(smaller.float(), table):
            return smaller
    return table.contiguous()
