"""Text to tokens and back: no broken characters, and helpful errors."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from amusd.fleet.model_description import BYTES_TOKENIZER
from amusd.protocol.errors import InvalidInputError, NotServedError
from orchestrator.chat import Message
from orchestrator.text import ModelText, TextCodec, load_text_codec

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system message comes first') }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] | tojson }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["déjà vu, naïve café ☕ and more words to merge"], trainer)
    return tokenizer


CODEC = ModelText(tiny_tokenizer(), TEMPLATE, {"eos_token": "<end>"})


def decoded(codec: TextCodec, tokens: list[int], cuts: list[int]) -> list[str]:
    """Decode ``tokens`` in chunks that end at ``cuts``; return the text of each chunk."""
    decoder = codec.decoder()
    ends = sorted({min(cut, len(tokens)) for cut in cuts} | {len(tokens)})
    chunks, start = [], 0
    for end in ends:
        chunks.append(decoder.feed(tokens[start:end]))
        start = end
    return [*chunks, decoder.finish()]


@settings(deadline=None)
@given(text=st.text(max_size=40), cuts=st.lists(st.integers(0, 200), max_size=30))
@pytest.mark.parametrize("codec", [CODEC, load_text_codec(BYTES_TOKENIZER)], ids=["bpe", "bytes"])
def test_chunks_join_to_the_text_and_no_chunk_breaks_a_character(
    codec: TextCodec, text: str, cuts: list[int]
) -> None:
    chunks = decoded(codec, codec.encode(text) if text else [], cuts)
    assert "".join(chunks) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in chunk for chunk in chunks)


@settings(deadline=None)
@given(tokens=st.lists(st.integers(0, 299), max_size=40))
def test_any_tokens_decode_to_the_same_text_in_chunks_as_at_once(tokens: list[int]) -> None:
    known = [token for token in tokens if token < tiny_size()]
    chunks = decoded(CODEC, known, list(range(len(known))))
    assert "".join(chunks) == "".join(decoded(CODEC, known, []))


def tiny_size() -> int:
    return tiny_tokenizer().get_vocab_size()


def test_other_threads_run_while_a_text_is_encoded() -> None:
    ended = threading.Event()
    num_rounds = 0

    def count() -> None:
        nonlocal num_rounds
        while not ended.wait(0.001):
            num_rounds += 1

    with ThreadPoolExecutor(1) as other:
        counted = other.submit(count)
        try:
            CODEC.encode("naïve café " * 50_000)
        finally:
            ended.set()
        counted.result(10)
    assert num_rounds >= 10


def test_special_tokens_have_no_text() -> None:
    assert "".join(decoded(CODEC, CODEC.encode("<end>"), [])) == ""


@pytest.mark.parametrize("codec", [CODEC, load_text_codec(BYTES_TOKENIZER)], ids=["bpe", "bytes"])
def test_an_incomplete_character_at_the_end_becomes_a_replacement_character(
    codec: TextCodec,
) -> None:
    decoder = codec.decoder()
    first_byte = codec.encode("ÿ")[:1]
    assert decoder.feed(first_byte) == ""
    assert decoder.finish() == "\ufffd"


def test_a_conversation_is_rendered_up_to_the_assistants_turn() -> None:
    tokens = CODEC.encode_chat([Message("user", "déjà")])
    rendered = '<user>"déjà"<end><assistant>'
    assert tokens == CODEC.encode(rendered)


def test_messages_that_the_template_refuses_are_an_invalid_input() -> None:
    messages = [Message("user", "a"), Message("system", "b")]
    with pytest.raises(InvalidInputError, match="the system message comes first"):
        CODEC.encode_chat(messages)


def test_a_model_without_a_template_refuses_chat() -> None:
    codec = ModelText(tiny_tokenizer(), None, {})
    with pytest.raises(NotServedError, match="send the prompt as text"):
        codec.encode_chat([Message("user", "hi")])


def test_without_a_tokenizer_prompts_must_be_token_ids() -> None:
    codec = load_text_codec("")
    with pytest.raises(NotServedError, match="as token ids"):
        codec.encode("hi")
    assert decoded(codec, [1, 2, 3], []) == ["", ""]


def test_a_tokenizer_is_loaded_from_its_folder(tmp_path: Path) -> None:
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "eos_token": {"content": "<end>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    codec = load_text_codec(str(tmp_path))
    assert codec.encode("café") == CODEC.encode("café")
    messages = [Message("user", "hi")]
    assert codec.encode_chat(messages) == CODEC.encode_chat(messages)


def test_a_template_may_be_in_its_own_file(tmp_path: Path) -> None:
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    codec = load_text_codec(str(tmp_path))
    assert codec.encode_chat([Message("user", "hi")]) == CODEC.encode("hi")


@pytest.mark.parametrize("content", [None, "{", '{"model": 1}'])
def test_a_folder_without_a_usable_tokenizer_is_refused(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InvalidInputError, match="--tokenizer") as caught:
        load_text_codec(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
