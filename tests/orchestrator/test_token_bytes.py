"""The bytes of single tokens join to the text of an output."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amusd.fleet.model_description import BYTES_TOKENIZER
from orchestrator.detokenizer import Detokenizer
from orchestrator.text import NoText, load_text_codec
from orchestrator.token_bytes import TokenBytes
from tests.orchestrator.small_tokenizers import small_tokenizers
from tests.orchestrator.test_detokenizer import pieces, some_tokens, tokens_of

TOKENIZERS = small_tokenizers()
JOINING = [
    "byte-level", "byte-level, few bytes", "llama", "llama, few bytes", "llama, no bytes", "gemma",
    "metaspace never",
]  # fmt: skip


@pytest.mark.parametrize("name", JOINING)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_the_bytes_of_an_outputs_tokens_are_its_text(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = TokenBytes(tokenizer, Detokenizer(tokenizer))
    prompt = [one for one in (tokenizer.token_to_id(word) for word in ("▁B", "A")) if one]
    output = data.draw(some_tokens(tokenizer, 20))
    text = "".join(pieces(tokenizer, output, prompt))
    joined = b"".join(tokens.of(token) for token in output)
    if "\ufffd" not in text:  # of broken bytes, which a text cannot hold
        assert joined.decode() == text


@pytest.mark.parametrize(
    ("name", "words", "found"),
    [
        ("byte-level", "Ġthe Ã © âĤ ¬ <tool> ☕", [b" the", b"\xc3", b"\xa9", b"\xe2\x82", b"\xac",
                                                   b"<tool>", "☕".encode()]),
        ("llama", "▁A <0xE2> <0x82> <0xAC> </s> C", [b" A", b"\xe2", b"\x82", b"\xac", b"", b"C"]),
        ("gemma", "▁A <0x0A>", [b" A", b"\n"]),
        ("metaspace", "▁A C", [b" A", b"C"]),
        ("wordpiece", "hello ##s", [b" hello", b"s"]),
    ],
)  # fmt: skip
def test_tokens_have_their_real_bytes(name: str, words: str, found: list[bytes]) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = TokenBytes(tokenizer, Detokenizer(tokenizer))
    for _ in range(2):  # the second time from memory
        assert [tokens.of(token) for token in tokens_of(tokenizer, words)] == found


def test_a_token_that_begins_a_text_lacks_the_space_before_its_word() -> None:
    tokenizer = TOKENIZERS["llama"]
    tokens = TokenBytes(tokenizer, Detokenizer(tokenizer))
    (word,) = tokens_of(tokenizer, "▁A")
    assert (tokens.of(word, begins_text=True), tokens.of(word)) == (b"A", b" A")


def test_unknown_tokens_have_no_bytes() -> None:
    tokenizer = TOKENIZERS["llama"]
    tokens = TokenBytes(tokenizer, Detokenizer(tokenizer))
    assert tokens.of(1 << 31) == b""
    assert load_text_codec(BYTES_TOKENIZER).token_bytes(300) == b""
    assert load_text_codec(BYTES_TOKENIZER).token_bytes(255) == b"\xff"
    assert NoText().token_bytes(65) == b""
