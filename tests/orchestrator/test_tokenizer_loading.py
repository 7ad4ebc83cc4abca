"""A tokenizer folder gives the tokens of Transformers, whichever of its files name what."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoTokenizer

from amusd.protocol.errors import InvalidInputError, NotServedError
from orchestrator.chat import Message
from orchestrator.text import load_text_codec
from tests.orchestrator.template_shapes import Shape

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}{{ sep_token }}{% endfor %}"
    + "".join(f"[{{{{ {name} }}}}]" for name in (*NAMES, "image_token", "video_token"))
)
TEXT = "<s>ab<sep> in <new> a<extra>b </s><|im_end|>"
CONTENT = "a <new> in"
CONFIG: dict[str, Any] = {"chat_template": TEMPLATE}
ADDED = {"lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
Files = dict[str, Any]

FOLDERS: dict[str, Files] = {
    "config": {"tokenizer_config.json": CONFIG | {"bos_token": "<s>", "sep_token": "<sep>"}},
    "map": {"special_tokens_map.json": {"bos_token": "<s>", "sep_token": {"content": "<sep>"}}},
    "map over config": {
        "tokenizer_config.json": CONFIG | {"bos_token": "<s>", "sep_token": "<sep>"},
        "special_tokens_map.json": {"bos_token": "<new>"},
    },
    "map with null": {
        "tokenizer_config.json": CONFIG | {"bos_token": "<s>"},
        "special_tokens_map.json": {"bos_token": None},
    },
    "no map beside a decoder of added tokens": {
        "tokenizer_config.json": CONFIG
        | {"bos_token": "<s>", "added_tokens_decoder": {"400": {"content": "<new>", **ADDED}}},
        "special_tokens_map.json": {"bos_token": "<sep>", "cls_token": "<sep>"},
        "added_tokens.json": {"<extra>": 401},
    },
    "other flags in the decoder of added tokens": {
        "tokenizer_config.json": CONFIG
        | {"added_tokens_decoder": {"262": {"content": "<s>", "special": True, **ADDED}}},
    },
    "additional tokens": {
        "tokenizer_config.json": CONFIG | {"additional_special_tokens": ["<new>", "<extra>"]},
    },
    "additional tokens in the map": {
        "special_tokens_map.json": {"additional_special_tokens": ["<new>", "<extra>"]},
    },
    "extra tokens in both": {
        "tokenizer_config.json": CONFIG | {"extra_special_tokens": ["<new>"]},
        "special_tokens_map.json": {"extra_special_tokens": ["<extra>", {"content": "<more>"}]},
    },
    "extra tokens with names": {
        "tokenizer_config.json": CONFIG
        | {"extra_special_tokens": {"image_token": "<new>"}, "video_token": "<extra>"},
    },
    "extra tokens with names in the map": {
        "tokenizer_config.json": CONFIG | {"image_token": "<sep>"},
        "special_tokens_map.json": {"extra_special_tokens": {"image_token": "<new>"}},
    },
    "tokens with a name of their own in the map": {
        "special_tokens_map.json": {"image_token": "<new>", "video_token": {"content": "<extra>"}},
    },
    "added tokens": {
        "tokenizer_config.json": CONFIG | {"eos_token": "<extra>"},
        "added_tokens.json": {"<new>": 266, "<extra>": 265, "<s>": 262},
    },
    "added tokens in order": {
        "tokenizer_config.json": CONFIG | {"eos_token": "<extra>", "cls_token": "<new>"},
        "added_tokens.json": {"<new>": 267, "<extra>": 266},
    },
    "flags to begin or end a text": {
        "tokenizer_config.json": CONFIG
        | {"bos_token": "<s>", "add_bos_token": True, "add_eos_token": True, "eos_token": "</s>"},
    },
    "special tokens that are split": {
        "tokenizer_config.json": CONFIG | {"bos_token": "<s>", "split_special_tokens": True},
    },
    "templates with names": {
        "tokenizer_config.json": {
            "chat_template": [
                {"name": "tool_use", "template": "wrong"},
                {"name": "default", "template": "right"},
            ]
        },
    },
    "a template in its own file": {
        "tokenizer_config.json": {"chat_template": "wrong"},
        "chat_template.jinja": "right",
    },
    "templates in files of their own": {
        "tokenizer_config.json": {"chat_template": "wrong"},
        "chat_template.jinja": "right",
        "additional_chat_templates/tool_use.jinja": "wrong",
    },
    "a default among the named files": {
        "chat_template.jinja": "wrong",
        "additional_chat_templates/default.jinja": "right",
    },
    "the processor's file beside a template": {
        "chat_template.json": {"chat_template": "wrong"},
    },
}


def base_tokenizer() -> Tokenizer:
    """Return a byte-level tokenizer that begins a text with ``<s>``."""
    tokenizer = Shape("", ("<sep>",)).tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def folder_of(folder: Path, files: Files, tokenizer: Tokenizer | None = None) -> str:
    """Write a tokenizer folder and return its path."""
    (tokenizer or base_tokenizer()).save(str(folder / "tokenizer.json"))
    for name, content in ({"tokenizer_config.json": CONFIG} | files).items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


def check_equals_transformers(folder: str) -> None:
    """Compare the tokens of a plain text and of two conversations."""
    codec, theirs = load_text_codec(folder), AutoTokenizer.from_pretrained(folder)
    assert codec.encode(TEXT) == theirs(TEXT)["input_ids"]
    for parse in (True, False):
        expected = theirs.apply_chat_template(
            [{"role": "user", "content": CONTENT}],
            add_generation_prompt=True,
            sanitize_control_tokens=not parse,
            return_dict=False,
        )
        messages = [Message("user", CONTENT)]
        assert codec.encode_chat(messages, parse_special_tokens=parse) == expected


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_gives_the_tokens_of_transformers(case: str, tmp_path: Path) -> None:
    check_equals_transformers(folder_of(tmp_path, FOLDERS[case]))


SPELLINGS = st.sampled_from(["<s>", "</s>", "<sep>", "<new>", "<extra>", None])
TOKENS = st.dictionaries(st.sampled_from([*NAMES, "image_token"]), SPELLINGS, max_size=5)


@settings(deadline=None, max_examples=15)
@given(config=TOKENS, special_map=TOKENS, added=st.booleans(), decoder=st.booleans())
def test_tokens_named_in_any_files_are_those_of_transformers(
    config: dict[str, str | None],
    special_map: dict[str, str | None],
    added: bool,
    decoder: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    files: Files = {
        "tokenizer_config.json": CONFIG
        | config
        | ({"added_tokens_decoder": {}} if decoder else {}),
        "special_tokens_map.json": special_map,
    }
    if added:
        files["added_tokens.json"] = {"<new>": 270}
    check_equals_transformers(folder_of(tmp_path_factory.mktemp("folder"), files))


@pytest.mark.parametrize(
    "setting",
    [
        {
            "truncation": {
                "direction": "Right",
                "max_length": 4,
                "strategy": "LongestFirst",
                "stride": 0,
            }
        },
        {
            "truncation": {
                "direction": "Left",
                "max_length": 4,
                "strategy": "OnlyFirst",
                "stride": 1,
            }
        },
        {"padding": {"strategy": {"Fixed": 64}, "direction": "Right"}},
        {"padding": {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": 32}},
    ],
    ids=["truncation", "truncation on the left", "padding", "padding to a multiple"],
)
def test_truncation_and_padding_of_the_file_are_off(setting: Files, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {})
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content |= setting
    if "padding" in setting:
        pad = {"pad_id": 0, "pad_type_id": 0, "pad_token": "</s>", "pad_to_multiple_of": None}
        content["padding"] = pad | content["padding"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    check_equals_transformers(folder)
    assert load_text_codec(folder).encode("a" * 100) == base_tokenizer().encode("a" * 100).ids


def test_a_folder_without_tokenizer_config_has_its_template_in_the_file(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"chat_template.jinja": "right"})
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_text_codec(folder).encode_chat([Message("user", "x")])[1:] == encoded("ight")


def test_the_processors_template_is_used_where_there_is_no_other(tmp_path: Path) -> None:
    files: Files = {"tokenizer_config.json": {}, "chat_template.json": {"chat_template": "right"}}
    codec = load_text_codec(folder_of(tmp_path, files))
    assert codec.encode_chat([Message("user", "x")]) == encoded("right")


def test_tools_choose_the_template_for_tools(tmp_path: Path) -> None:
    files: Files = {
        "chat_template.jinja": "default",
        "additional_chat_templates/tool_use.jinja": "{{ tools[0].name }}",
    }
    codec = load_text_codec(folder_of(tmp_path, files))
    assert codec.encode_chat([Message("user", "x")]) == encoded("default")
    assert codec.encode_chat([Message("user", "x")], {"tools": [{"name": "b"}]}) == encoded("b")


def test_named_templates_without_a_default_are_said(tmp_path: Path) -> None:
    config = {"chat_template": [{"name": "rag", "template": "x"}]}
    codec = load_text_codec(folder_of(tmp_path, {"tokenizer_config.json": config}))
    with pytest.raises(NotServedError, match=r"rag.*none is the default: send the prompt as text"):
        codec.encode_chat([Message("user", "x")])


def encoded(text: str) -> list[int]:
    return list(base_tokenizer().encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"tokenizer_config.json": "["}, "tokenizer_config.json: "),
        ({"tokenizer_config.json": []}, "tokenizer_config.json is no JSON object"),
        ({"special_tokens_map.json": {"bos_token": 3}}, "bos_token: a token is a text"),
        ({"added_tokens.json": {"<new>": "x"}}, "the id of a token is no number"),
        ({"tokenizer_config.json": {"chat_template": 3}}, "chat_template is neither"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"x": "<s>"}}}, "invalid literal"),
    ],
)
def test_a_broken_file_is_named(files: Files, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=reason):
        load_text_codec(folder_of(tmp_path, files))


def test_an_added_token_keeps_its_flags(tmp_path: Path) -> None:
    tokenizer = base_tokenizer()
    tokenizer.add_tokens([AddedToken("<new>", rstrip=True, lstrip=True, normalized=False)])
    check_equals_transformers(folder_of(tmp_path, {}, tokenizer))


def test_a_model_of_the_hub_is_read_from_its_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path, {"additional_chat_templates/default.jinja": "right"})
    asked: list[tuple[str, list[str]]] = []

    def download(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    codec = load_text_codec("owner/model")
    assert codec.encode_chat([Message("user", "x")]) == encoded("right")
    [(repository, patterns)] = asked
    assert repository == "owner/model"
    for file in tmp_path.rglob("*.*"):
        assert any(fnmatch(str(file.relative_to(tmp_path)), pattern) for pattern in patterns)
    assert not any(fnmatch("model.safetensors", pattern) for pattern in patterns)
