"""Tiny models of random weights, of several families, with a tokenizer of bytes."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 256
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128}
HEADS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON = SIZES | HEADS | {"max_position_embeddings": 400, "initializer_range": 0.3}
NO_SPECIAL: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def build(family: str) -> PreTrainedModel:
    """Return a model of random weights, large enough that its outputs do not tie."""
    torch.manual_seed(3)
    match family:
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**COMMON, **NO_SPECIAL))
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**COMMON, **NO_SPECIAL))
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**COMMON, **NO_SPECIAL, head_dim=32))
        case "mistral":
            config = MistralConfig(**COMMON, **NO_SPECIAL, sliding_window=None)
            return MistralForCausalLM(config)
        case _:
            sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2}
            gpt2 = GPT2Config(
                **sizes, **NO_SPECIAL, n_head=4, n_positions=400, initializer_range=0.3
            )
            return GPT2LMHeadModel(gpt2)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]


def perturbed(model: PreTrainedModel, noise: float) -> PreTrainedModel:
    """Return a copy that agrees with ``model`` the less, the more noise there is."""
    torch.manual_seed(4)
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for weight in copy.parameters():
            weight.add_(noise * weight.std() * torch.randn_like(weight))
    return copy


def save(model: PreTrainedModel, folder: Path, chat_template: str | None = None) -> str:
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return str(folder)
