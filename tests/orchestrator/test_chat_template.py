"""Chat templates render as in Transformers, and broken ones are reported."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from amusd.protocol.errors import InvalidInputError
from orchestrator.chat import Message
from orchestrator.text import ModelText, load_text_codec

MESSAGES = [Message("system", "Be brief."), Message("user", 'Say "é" & <b>.')]

TEMPLATES = {
    "tools tested for none": (
        "{% if tools is not none %}TOOLS{% endif %}{% if documents is none %}-{% endif %}"
        "{{ messages[1].content }}"
    ),
    "tools that may be undefined": (
        "{% if not tools is defined %}{% set tools = none %}{% endif %}"
        "{% if tools is none %}{{ messages[0].role }}{% endif %}"
    ),
    "a loop with break": (
        "{% for m in messages %}{% if m.role == 'user' %}{% break %}{% endif %}"
        "{{ m.content }}{% endfor %}"
    ),
    "generation tags": (
        "{% for m in messages %}{% generation %}{{ m.content | trim }}{{ eos_token }}"
        "{% endgeneration %}\n{% endfor %}"
    ),
    "blocks on lines of their own": (
        "{% for m in messages %}\n    {% if true %}\n{{ m['role'] }}: {{ m['content'] }}\n"
        "    {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}\nassistant:\n{% endif %}\n"
    ),
    "json": "{{ messages | tojson(indent=2) }}",
    "a namespace": (
        "{% set seen = namespace(count=0) %}{% for m in messages %}"
        "{% set seen.count = seen.count + 1 %}{% endfor %}{{ seen.count }}"
    ),
}


def letters() -> Tokenizer:
    """Return a tokenizer with one token for each byte, and ``<end>``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)} | {"<end>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_renders_as_in_transformers(case: str) -> None:
    template = TEMPLATES[case]
    theirs = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=letters(), eos_token="<end>", chat_template=template
    )
    expected = theirs.apply_chat_template(
        [{"role": one.role, "content": one.content} for one in MESSAGES],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    ours = ModelText(letters(), template, {"eos_token": "<end>"}).encode_chat(MESSAGES)
    assert letters().decode(ours, skip_special_tokens=False)
    assert ours == list(expected)


def folder_with(tmp_path: Path, chat_template: object) -> str:
    """Write a tokenizer folder and return its path."""
    letters().save(str(tmp_path / "tokenizer.json"))
    config = {"chat_template": chat_template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_the_default_of_several_templates_is_used(tmp_path: Path) -> None:
    templates = [
        {"name": "tool_use", "template": "wrong"},
        {"name": "default", "template": "right"},
    ]
    codec = load_text_codec(folder_with(tmp_path, templates))
    assert codec.encode_chat(MESSAGES) == codec.encode("right")


def test_a_template_that_does_not_compile_is_refused_at_load(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"chat template of .* is broken") as caught:
        load_text_codec(folder_with(tmp_path, "{% for m in messages %}\n{{ m"))
    assert "\n" not in str(caught.value)


def test_an_error_of_a_template_becomes_one_line() -> None:
    codec = ModelText(letters(), "{{ raise_exception('first\nsecond') }}", {})
    with pytest.raises(InvalidInputError, match="first second"):
        codec.encode_chat(MESSAGES)


@pytest.mark.parametrize("expression", ["messages[5].content.x", "''.__class__.__mro__"])
def test_a_forbidden_expression_in_a_template_is_an_invalid_input(expression: str) -> None:
    codec = ModelText(letters(), "{{ " + expression + " + 'x' }}", {})
    with pytest.raises(InvalidInputError, match="refuses the messages"):
        codec.encode_chat(MESSAGES)


def test_a_last_message_of_the_assistant_is_continued() -> None:
    template = "{% for m in messages %}{{ m.content | trim }}{{ eos_token }}{% endfor %}"
    codec = ModelText(letters(), template, {"eos_token": "<end>"})
    messages = [Message("user", "Hi"), Message("assistant", "Hello, I  ")]
    assert codec.encode_chat(messages) == codec.encode("Hi<end>Hello, I")


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", "{{ messages[1].content[:3] }}"])
def test_a_message_that_the_template_changes_cannot_be_continued(template: str) -> None:
    codec = ModelText(letters(), template, {})
    with pytest.raises(InvalidInputError, match="cannot be continued"):
        codec.encode_chat([Message("user", "Hi"), Message("assistant", "Hello")])


def test_a_message_without_text_cannot_be_continued() -> None:
    codec = ModelText(letters(), "{{ messages }}", {})
    with pytest.raises(InvalidInputError, match="no text to continue"):
        codec.encode_chat([Message("assistant", "", {"content": [{"type": "image"}]})])


def test_no_character_is_lost_beside_the_name_of_a_special_token() -> None:
    content = "a\U000f0000<end>\U000f0001b"
    codec = ModelText(letters(), "{{ messages[0].content }}", {"eos_token": "<end>"})
    tokens = codec.encode_chat([Message("user", content)])
    assert letters().token_to_id("<end>") not in tokens
    assert letters().decode(tokens) == content


def test_the_name_of_a_special_token_becomes_the_token_on_request() -> None:
    codec = ModelText(letters(), "{{ messages[0].content }}", {"eos_token": "<end>"})
    tokens = codec.encode_chat([Message("user", "a<end>")], parse_special_tokens=True)
    assert tokens[-1] == letters().token_to_id("<end>")


def test_a_special_token_that_plain_text_also_makes_is_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>"])
    codec = ModelText(tokenizer, "{{ messages[0].content }}", {})
    with pytest.raises(InvalidInputError, match="leave it out, or set parse_special_tokens"):
        codec.encode_chat([Message("user", "a <end>")])


def test_names_of_special_tokens_in_roles_and_tools_are_plain_text() -> None:
    codec = ModelText(
        letters(),
        "{{ messages[0].role }}{{ tools[0].name }}{{ eos_token }}",
        {"eos_token": "<end>"},
    )
    tokens = codec.encode_chat([Message("<end>", "x")], {"tools": [{"name": "<end>"}]})
    assert [token for token in tokens if token == letters().token_to_id("<end>")] == tokens[-1:]


def test_text_that_is_no_unicode_is_an_invalid_input() -> None:
    codec = ModelText(letters(), "{{ messages[0].name }}", {})
    with pytest.raises(InvalidInputError, match="cannot encode the prompt"):
        codec.encode_chat([Message("user", "x", {"name": "\ud800"})])
    with pytest.raises(InvalidInputError, match="cannot encode the prompt"):
        codec.encode("\ud800")
