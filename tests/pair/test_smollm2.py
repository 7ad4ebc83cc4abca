"""The real pair: exact weights, the original tokenizer, and a draft that fits."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.numpy import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from amusd.engine.loading.reduced_head import load_causal_lm
from amusd.pair import EmbeddedPair, ensure_smollm2, resolve_model
from amusd.pair.cache import CACHE_VARIABLE, damaged_files
from amusd.pair.source import SmolLM2Gguf, find_gguf

pytestmark = pytest.mark.pair

TEXTS = (
    "def add(a, b):\n    return a + b  # 12345\n\n\n\tif x != 0.5:\n\t\tpass\n",
    "Häuser, cafés, naïve façade, Ελληνικά, русский, 日本語, العربية",
    "👩‍💻 ships 🚀🚀 at 9:41 on 2024-10-22  \r\n  (two  spaces)   ",
    "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n",
    "x" * 500 + "1" * 50 + " " * 70 + "\n" * 9,
    "It's they're I'LL 'quoted' don't",
    "",
)

_ENSURE = "from amusd.pair import ensure_smollm2; print(ensure_smollm2().draft)"


@dataclass(frozen=True, slots=True)
class RacedPair:
    """The pair that two concurrent processes built, and their output."""

    pair: EmbeddedPair
    cache: Path
    printed: tuple[str, str]
    exit_codes: tuple[int, int]


@pytest.fixture(scope="module")
def raced_pair() -> Iterator[RacedPair]:
    find_gguf()  # fails with the command that installs the weights
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, folder)
        first, second = (
            subprocess.Popen(
                [sys.executable, "-c", _ENSURE], env=os.environ, stdout=subprocess.PIPE, text=True
            )
            for _ in range(2)
        )
        printed = first.communicate()[0].strip(), second.communicate()[0].strip()
        codes = first.returncode, second.returncode
        yield RacedPair(ensure_smollm2(), Path(folder), printed, codes)


@pytest.fixture(scope="module")
def pair(raced_pair: RacedPair) -> EmbeddedPair:
    return raced_pair.pair


@pytest.fixture(scope="module")
def tokenizer(pair: EmbeddedPair) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(pair.verify)
    return loaded


@pytest.fixture(scope="module")
def verify_model(pair: EmbeddedPair) -> Any:
    return load_causal_lm(str(pair.verify), torch.float32, "cpu")[0]


def test_two_concurrent_processes_build_one_pair(raced_pair: RacedPair) -> None:
    assert raced_pair.exit_codes == (0, 0)
    assert raced_pair.printed == (str(raced_pair.pair.draft),) * 2
    made = {path.name for path in (raced_pair.cache / "smollm2").iterdir()}
    assert made <= {"verify", "draft", "verify.lock", "draft.lock"}


def test_both_folders_match_their_checksums(pair: EmbeddedPair) -> None:
    assert damaged_files(pair.verify) == []
    assert damaged_files(pair.draft) == []


def test_the_name_resolves_to_the_folder_of_the_role(pair: EmbeddedPair) -> None:
    assert resolve_model("smollm2", "verify") == str(pair.verify)
    assert resolve_model("smollm2", "draft") == str(pair.draft)


def test_every_weight_equals_the_dequantised_one(pair: EmbeddedPair) -> None:
    converted = load_file(pair.verify / "model.safetensors")
    names = [name for name, _ in SmolLM2Gguf(find_gguf()).tensors()]
    assert set(names) == set(converted)
    for name, tensor in zip(names, GGUFReader(find_gguf()).tensors, strict=True):
        ours = converted[name]
        if "q_proj" in name or "k_proj" in name:
            # Rows i and i + 32 of a head stand next to each other in GGUF.
            in_head = np.arange(64).reshape(2, 32).T.ravel()
            heads = np.arange(0, len(ours), 64)
            ours = ours[(heads[:, None] + in_head).ravel()]
        expected = dequantize(tensor.data, tensor.tensor_type)
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, expected, err_msg=name)


def test_transformers_loads_the_same_weights_with_a_tied_head(verify_model: Any) -> None:
    assert verify_model.lm_head.weight is verify_model.model.embed_tokens.weight
    assert verify_model.generation_config.eos_token_id == [2, 0]
    in_memory = dict(verify_model.named_parameters())
    for name, weights in SmolLM2Gguf(find_gguf()).tensors():
        assert torch.equal(in_memory.pop(name), torch.from_numpy(weights)), name
    assert in_memory == {}


def test_the_verify_model_talks_sense(
    verify_model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    inputs = tokenizer(str(prompt), return_tensors="pt")
    output = verify_model.generate(**inputs, max_new_tokens=16)[0]
    assert "Paris" in str(tokenizer.decode(output[inputs.input_ids.shape[1] :]))


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_stand_alone_and_special_tokens_are_one_id(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    assert tokenizer("<|im_start|>hi<|im_end|>").input_ids[::2] == [1, 2]
    assert tokenizer.decode([1, 2], skip_special_tokens=True) == ""
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)


def test_the_chat_template_opens_a_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" in str(text)


def test_the_draft_has_a_reduced_head_over_the_same_embedding(
    pair: EmbeddedPair, verify_model: Any
) -> None:
    draft: Any
    draft, token_of_row = load_causal_lm(str(pair.draft), torch.float32, "cpu")
    assert token_of_row is not None
    assert token_of_row.dtype == torch.int64
    assert (
        len(set(token_of_row.tolist())) == len(token_of_row) == draft.config.amusd_head_size == 8192
    )
    embedding = verify_model.model.embed_tokens.weight
    assert torch.equal(draft.model.embed_tokens.weight, embedding)
    assert torch.equal(draft.lm_head.weight, embedding[token_of_row])
    with torch.inference_mode():
        assert draft(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 8192)


def test_the_draft_guesses_a_fair_share_of_the_verify_models_tokens(
    pair: EmbeddedPair, verify_model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    draft: Any
    draft, token_of_row = load_causal_lm(str(pair.draft), torch.float32, "cpu")
    assert token_of_row is not None
    inputs = tokenizer("def mean(numbers: list[float]) -> float:\n", return_tensors="pt")
    text = verify_model.generate(**inputs, max_new_tokens=32)  # [1, T]
    first = inputs.input_ids.shape[1]
    with torch.inference_mode():
        guesses = token_of_row[draft(text).logits[0, first - 1 : -1].argmax(-1)]
    assert (guesses == text[0, first:]).float().mean() > 0.2


def test_the_draft_shares_the_tokenizer(pair: EmbeddedPair) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (pair.draft / name).read_bytes() == (pair.verify / name).read_bytes()
