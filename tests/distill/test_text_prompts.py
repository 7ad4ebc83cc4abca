from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from amusd.distill.text_prompts import PromptSource
from amusd.distill.writer import TextWriter
from amusd.prompts import Prompt, encode
from amusd.protocol.errors import InvalidInputError

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}<assistant>"


@pytest.fixture
def tokenizer(verify_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(verify_folder)


def test_a_made_up_turn_stands_in_the_chat_template(tokenizer: Any, writer: TextWriter) -> None:
    tokenizer.chat_template = TEMPLATE
    for prompt in PromptSource(tokenizer, (), 1.0, 200).batch(0, 6, seed=1, writer=writer):
        text = tokenizer.decode(prompt)
        assert text.startswith("<user>")
        assert text.endswith(";<assistant>")


def test_without_a_template_the_model_begins_a_text(tokenizer: Any, writer: TextWriter) -> None:
    prompts = PromptSource(tokenizer, (), 1.0, 200).batch(0, 4, seed=1, writer=writer)
    assert len(prompts) == 4
    assert all(len(prompt) > 20 for prompt in prompts)


def test_given_prompts_all_come_before_one_comes_again(tokenizer: Any, writer: TextWriter) -> None:
    given = [Prompt(text=f"prompt {number}") for number in range(10)]
    source = PromptSource(tokenizer, given, 0.0, 200)
    asked = [p for number in range(4) for p in source.batch(number, 5, seed=2, writer=writer)]
    texts = [tokenizer.decode(prompt) for prompt in asked]
    assert sorted(texts[:10]) == sorted(prompt.text for prompt in given)
    assert sorted(texts[10:]) == sorted(texts[:10])
    assert texts[10:] != texts[:10]


def test_made_up_and_given_batches_take_turns(tokenizer: Any, writer: TextWriter) -> None:
    source = PromptSource(tokenizer, [Prompt(text="given")], 0.5, 200)
    given = encode(Prompt(text="given"), tokenizer)
    kinds = [source.batch(number, 2, 0, writer)[0] == given for number in range(6)]
    assert kinds == [True, False] * 3


def test_a_long_prompt_loses_its_beginning(tokenizer: Any, writer: TextWriter) -> None:
    source = PromptSource(tokenizer, [Prompt(text="a" * 50 + "b" * 50)], 0.0, 60)
    assert tokenizer.decode(source.batch(0, 1, 0, writer)[0]) == "a" * 10 + "b" * 50


def test_a_conversation_needs_a_template(tokenizer: Any) -> None:
    with pytest.raises(InvalidInputError, match="no chat template"):
        encode(Prompt.chat("hello"), tokenizer)
