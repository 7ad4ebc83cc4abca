"""How much text fits: a bound that never refuses a text that would have fitted."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from amusd.protocol.errors import InvalidInputError
from orchestrator.chat import Message
from orchestrator.text import ByteText, ModelText
from orchestrator.text_bound import TextBound

BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}


def byte_level(**changes: object) -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)} | {"th": 256, "the": 257}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def without_rare_bytes() -> Tokenizer:
    """A tokenizer that leaves out what it has never seen, such as the first byte of an emoji."""
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set("ðĢ!"))
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def byte_fallback(without: str = "") -> Tokenizer:
    vocabulary = BYTES | {"▁": 256, "a": 257, "aa": 258}
    vocabulary.pop(without, None)
    model = models.BPE(vocabulary, [("a", "a")], byte_fallback=True, unk_token=None)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return tokenizer


def with_stripping_token() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    return tokenizer


BOUNDED = {
    "byte level": byte_level(),
    "byte level, composed": byte_level(normalizer=normalizers.NFC()),
    "byte level, compatible": byte_level(
        normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ),
    "byte fallback": byte_fallback(),
    "a token that takes spaces": with_stripping_token(),
    "rare bytes have no token": without_rare_bytes(),
}
UNBOUNDED = {
    "a word is one token": Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")),
    "pieces of words": Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")),
    "unknown characters are one token": Tokenizer(
        models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", fuse_unk=True)
    ),
    "spaces are dropped": byte_level(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()]
        )
    ),
    "a split removes": byte_level(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Split("-", "removed"), pre_tokenizers.ByteLevel()]
        )
    ),
    "the ends are stripped": byte_level(normalizer=normalizers.Strip()),
    "accents are stripped": byte_level(normalizer=normalizers.StripAccents()),
    "a replacement is shorter": byte_level(normalizer=normalizers.Replace("  ", " ")),
    "a replacement by pattern": byte_level(normalizer=normalizers.Replace(Regex(" +"), " ")),
    "a byte has no token": byte_fallback(without="<0xE2>"),
}
TEXTS = st.text(
    st.one_of(
        st.sampled_from(" \n\tthe<mask>a!\x81à€é\u0301\u1112\u1161\u11ab𝐀\ufb03\U0001f600"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=60,
) | st.just(" " * 500 + "<mask>" + "\t" * 500)


@pytest.mark.parametrize("name", BOUNDED)
@given(text=TEXTS)
@settings(max_examples=60, deadline=None)
def test_a_text_that_fits_is_never_refused(name: str, text: str) -> None:
    tokenizer = BOUNDED[name]
    bound = TextBound.of(tokenizer)
    assert bound.bytes_per_token is not None
    bound.check(text, len(tokenizer.encode(text).ids))


@pytest.mark.parametrize("name", UNBOUNDED)
def test_tokenizers_that_may_lose_characters_have_no_bound(name: str) -> None:
    bound = TextBound.of(UNBOUNDED[name])
    assert bound == TextBound(None)
    bound.check("a" * 10_000, 1)


def test_the_bound_is_the_longest_token_of_all() -> None:
    tokenizer = byte_level()
    assert TextBound.of(tokenizer) == TextBound(3)
    tokenizer.add_tokens(["longer é"])
    assert TextBound.of(tokenizer) == TextBound(9)


@pytest.mark.parametrize("text", ["the " * 100, "é" * 200, "x" * 400])
def test_a_text_beyond_the_bound_is_refused_with_its_size_and_the_limit(text: str) -> None:
    bound = TextBound(3)
    bound.check(text, 134)
    with pytest.raises(InvalidInputError, match=r"400 bytes.*133 tokens holds at most 399 bytes"):
        bound.check(text, 133)


def test_spaces_do_not_count_where_a_token_may_take_them() -> None:
    TextBound(1, counts_space=False).check(" \n" * 500_000 + "four", 4)
    with pytest.raises(InvalidInputError, match="5 bytes"):
        TextBound(1, counts_space=False).check(" five5 ", 4)


def test_texts_and_chats_are_refused_before_they_are_tokenized() -> None:
    """Tokenizing one word of 4 MB takes seconds."""
    template = "{% for one in messages %}{{ one.content }}{% endfor %}"
    codec = ModelText(byte_level(), template, {})
    text = "".join(random.Random(1).choices("abcdefgh", k=4_000_000))
    started = time.process_time()
    with pytest.raises(InvalidInputError, match="shorten the prompt"):
        codec.encode(text, 1000)
    for parses in (False, True):
        with pytest.raises(InvalidInputError, match="shorten the prompt"):
            codec.encode_chat([Message("user", text)], {}, parses, 1000)
    with pytest.raises(InvalidInputError, match="shorten the prompt"):
        ByteText().encode(text, 1000)
    assert time.process_time() - started < 1


def test_what_a_chat_template_leaves_out_does_not_count() -> None:
    codec = ModelText(byte_level(), "{{ messages[-1].content }}", {})
    messages = [Message("user", "a" * 1000), Message("user", "bc")]
    assert codec.encode_chat(messages, {}, False, 2) == codec.encode("bc")
