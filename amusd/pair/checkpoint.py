"""Writes model folders in the Hugging Face layout: configuration, weights, tokenizer.

This module does not know where weights come from. A folder may have a reduced output head: row i of
``lm_head.weight`` scores the token ``head_token_ids[i]``, as in FR-Spec (arXiv 2502.14856).
``from_pretrained`` loads a full head, ``amusd.engine.loading.reduced_head`` loads both kinds.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from amusd.pair.source import LlamaShape, Vocabulary

HEAD_IDS_NAME = "head_token_ids"
HEAD_SIZE_KEY = "amusd_head_size"

Tensors = dict[str, np.ndarray[Any, Any]]
TokenIds = np.ndarray[Any, np.dtype[np.integer[Any]]]


def write_weights(folder: Path, tensors: Tensors) -> None:
    """Write model.safetensors from contiguous tensors with Hugging Face names.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / "model.safetensors"
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # raised if the disk is full
        raise OSError(str(error)) from error
    path.chmod(0o644)  # safetensors makes it private, but users may share a cache


def write_config(folder: Path, shape: LlamaShape, vocabulary: Vocabulary) -> None:
    """Write config.json and generation_config.json of a Llama with tied embeddings."""
    special = {
        "bos_token_id": vocabulary.bos_id,
        # <|endoftext|> ends a plain document as <|im_end|> ends a turn.
        "eos_token_id": [vocabulary.eos_id, vocabulary.unk_id],
        "pad_token_id": vocabulary.pad_id,
    }
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.mlp_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.hidden_size // shape.num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "dtype": "float32",
        **special,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"do_sample": False, **special})


def write_reduced_head_folder(
    folder: Path, parent: Path, body: Tensors, head_token_ids: TokenIds
) -> None:
    """Write a model that shares the embedding and the tokenizer of the folder ``parent``.

    ``body`` holds the tensors of layers 0, 1, ... and of the final norm, with Hugging Face names.
    The head consists of the rows ``head_token_ids`` [H] of the parent's embedding.
    """
    with safe_open(parent / "model.safetensors", framework="numpy") as weights:
        embedding = weights.get_tensor("model.embed_tokens.weight")  # [V, D]
    head_ids = head_token_ids.astype(np.int64)
    tensors: Tensors = {name: tensor.astype(np.float32) for name, tensor in body.items()}
    tensors["model.embed_tokens.weight"] = embedding
    tensors["lm_head.weight"] = np.ascontiguousarray(embedding[head_ids])
    tensors[HEAD_IDS_NAME] = head_ids
    write_weights(folder, tensors)
    config = json.loads((parent / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = num_layers(body)
    config["tie_word_embeddings"] = False
    config[HEAD_SIZE_KEY] = len(head_ids)
    _write_json(folder / "config.json", config)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(parent / name, folder / name)


def num_layers(body: Tensors) -> int:
    """Return the number of layers among the tensor names."""
    return len({name.split(".")[2] for name in body if name.startswith("model.layers.")})


def write_tokenizer(folder: Path, vocabulary: Vocabulary) -> None:
    """Write tokenizer.json, and tokenizer_config.json with the chat template."""
    tokens = vocabulary.tokens
    table = build_tokenizer(vocabulary).to_str(pretty=True)
    (folder / "tokenizer.json").write_text(table, encoding="utf-8")
    config = {
        # The model-specific classes of Transformers replace the pre-tokenizer, which would lose the
        # splitting of digits. This class uses tokenizer.json unchanged.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[vocabulary.bos_id],
        "eos_token": tokens[vocabulary.eos_id],
        "unk_token": tokens[vocabulary.unk_id],
        "pad_token": tokens[vocabulary.pad_id],
        "additional_special_tokens": [tokens[i] for i in vocabulary.special_ids],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "chat_template": vocabulary.chat_template,
    }
    _write_json(folder / "tokenizer_config.json", config)


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """Return SmolLM2's tokenizer: single digits, then GPT-2's splitting, then byte-level BPE."""
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=list(vocabulary.merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(vocabulary.tokens[i], special=True, normalized=False)
            for i in vocabulary.special_ids
        ]
    )
    return tokenizer


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
