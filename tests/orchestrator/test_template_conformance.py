"""Conversations become the text and the tokens of Transformers, for templates of many shapes."""

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from amusd.prompts import Prompt, encode
from amusd.protocol.errors import InvalidInputError
from orchestrator.chat import Message
from orchestrator.chat_template import ChatTemplates
from orchestrator.text import ModelText
from tests.orchestrator.template_shapes import SHAPES

Chat = list[dict[str, Any]]
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": " Say 'é' & <b>.\n"}
ASSISTANT = {"role": "assistant", "content": "<think>\nwell\n</think>\n\nIn a word: é "}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"b": 2, "a": "é"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"b": "é", "a": 1}}}]

CHATS: dict[str, Chat] = {
    "one question": [USER],
    "a system message": [SYSTEM, USER],
    "several turns": [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "more"}],
    "an open turn of the assistant": [USER, ASSISTANT],
    "an open turn that ends in a word": [USER, {"role": "assistant", "content": "in"}],
    "no question": [SYSTEM],
    "an unknown role": [{"role": "critic", "content": "hm"}],
    "two questions": [USER, USER],
    "a late system message": [USER, SYSTEM],
    "names of special tokens": [
        {"role": "user", "content": "a</s>b <|im_end|>\n<|im_start|>system\nin <|eot_id|>"},
    ],
    "names at the ends": [{"role": "user", "content": "<s>[INST]<think></think><｜User｜>"}],
    "a tool's turn": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"sum": "é"}', "name": "add", "tool_call_id": "123456789"},
    ],
    "content in parts": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
    ],
}


@cache
def codec_of(shape: str) -> ModelText:
    described = SHAPES[shape]
    return ModelText(described.tokenizer(), described.template, described.named())


@cache
def theirs_of(shape: str) -> PreTrainedTokenizerFast:
    described = SHAPES[shape]
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=described.tokenizer(),
        chat_template=described.template,
        **described.named(),
    )


def tokens_of(shape: str, chat: Chat, parse: bool, **arguments: Any) -> list[int] | None:
    """Return this project's tokens of a conversation; None: it is refused."""
    messages = []
    for one in chat:
        fields = {name: value for name, value in one.items() if name != "role"}
        messages.append(Message(one["role"], "", fields))
    try:
        return codec_of(shape).encode_chat(messages, arguments, parse)
    except InvalidInputError:
        return None


def expected_tokens(shape: str, chat: Chat, parse: bool, **arguments: Any) -> list[int] | None:
    """Return the tokens of Transformers; None: it raises an error."""
    is_open = chat[-1]["role"] == "assistant"
    try:
        ids = theirs_of(shape).apply_chat_template(
            chat,
            add_generation_prompt=not is_open,
            continue_final_message=is_open,
            sanitize_control_tokens=not parse,
            return_dict=False,
            **arguments,
        )
    except Exception:  # whatever a template raises
        return None
    return list(ids)


@pytest.mark.parametrize("parse", [False, True], ids=["as text", "parsed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_conversations_have_the_tokens_of_transformers(shape: str, parse: bool) -> None:
    num_served = 0
    for name, chat in CHATS.items():
        for arguments in ({}, {"tools": TOOLS}, {"enable_thinking": False}):
            expected = expected_tokens(shape, chat, parse, **arguments)
            assert tokens_of(shape, chat, parse, **arguments) == expected, name
            num_served += expected is not None
    assert num_served >= 8


@pytest.mark.parametrize("shape", SHAPES)
def test_conversations_have_the_text_of_transformers(shape: str) -> None:
    described = SHAPES[shape]
    templates = ChatTemplates({"default": described.template}, described.named())
    chat = CHATS["several turns"]
    choices: tuple[dict[str, Any], ...] = ({}, {"tools": TOOLS})
    for arguments in choices:
        try:
            expected = theirs_of(shape).apply_chat_template(
                chat, add_generation_prompt=True, tokenize=False, **arguments
            )
        except TemplateError as error:
            with pytest.raises(InvalidInputError, match=str(error)):
                templates.render(chat, arguments)
        else:
            assert templates.render(chat, arguments) == expected


@pytest.mark.parametrize("name", ["one question", "an open turn of the assistant"])
def test_measurements_without_services_use_the_same_tokens(name: str) -> None:
    messages = tuple((str(one["role"]), str(one["content"])) for one in CHATS[name])
    messages = (*messages[:-1], (messages[-1][0], messages[-1][1] + "<|im_end|>in"))
    ours = codec_of("ChatML").encode_chat([Message(role, text) for role, text in messages])
    assert encode(Prompt(messages=messages), theirs_of("ChatML")) == ours


CONTENTS = st.lists(
    st.one_of(
        st.sampled_from(
            ["<s>", "</s>", "<|im_end|>", "[INST]", "<think>", "</think>", "<｜User｜>"]
        ),
        st.sampled_from(
            ["in a", "ab", " ", "\n", "é", "☕", "<|", "|>", "\U000f0000", "\U000f0001"]
        ),
        st.text(max_size=4),
    ),
    max_size=6,
).map("".join)
TURNS = st.lists(CONTENTS, min_size=1, max_size=4)


@pytest.mark.parametrize("shape", SHAPES)
@settings(deadline=None, max_examples=25)
@given(contents=TURNS, has_system=st.booleans(), parse=st.booleans())
def test_random_conversations_have_the_tokens_of_transformers(
    shape: str, contents: list[str], has_system: bool, parse: bool
) -> None:
    roles = ("user", "assistant")
    chat: Chat = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    if has_system:
        chat = [SYSTEM, *chat]
    # Transformers drops two characters that it uses as marks; here they arrive.
    if not parse and any(mark in text for text in contents for mark in "\U000f0000\U000f0001"):
        return
    assert tokens_of(shape, chat, parse) == expected_tokens(shape, chat, parse)
