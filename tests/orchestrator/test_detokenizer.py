"""Incremental decoding: pieces join to the text of the whole, and little is held back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from orchestrator.detokenizer import Detokenizer
from tests.orchestrator.small_tokenizers import small_tokenizers

TOKENIZERS = small_tokenizers()
MAX_HELD_BYTES = 32


def tokens_of(tokenizer: Tokenizer, words: str) -> list[int]:
    """Return the tokens with the names in ``words``, separated by spaces."""
    found = [tokenizer.token_to_id(word) for word in words.split()]
    assert None not in found
    return [token for token in found if token is not None]


def whole(tokenizer: Tokenizer, prompt: list[int], output: list[int]) -> str:
    """Return the text of an output after a prompt, decoded at once."""
    before, both = (decoded(tokenizer, tokens) for tokens in (prompt, [*prompt, *output]))
    return both[len(before) :]


def decoded(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """Return the text of tokens; some decoders of the library panic where there is none."""
    shown = [token for token in tokens if 3 <= token < tokenizer.get_vocab_size()]
    return str(tokenizer.decode(tokens)) if shown else ""


def pieces(
    tokenizer: Tokenizer, output: list[int], prompt: list[int], num_each: int = 1
) -> list[str]:
    """Decode an output in chunks of ``num_each`` tokens."""
    decoder = Detokenizer(tokenizer).decoder(prompt)
    starts = range(0, len(output), num_each)
    return [*(decoder.feed(output[i : i + num_each]) for i in starts), decoder.finish()]


@st.composite
def some_tokens(draw: st.DrawFn, tokenizer: Tokenizer, max_size: int) -> list[int]:
    """Tokens of a few kinds, so that runs are long; among them ids that do not exist."""
    ids = st.integers(0, tokenizer.get_vocab_size() + 1)
    kinds = draw(st.lists(ids, min_size=1, max_size=8))
    return draw(st.lists(st.sampled_from(kinds), max_size=max_size))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=80)
@given(data=st.data(), num_each=st.integers(1, 5))
def test_the_pieces_of_an_output_join_to_its_whole_text(
    name: str, data: st.DataObject, num_each: int
) -> None:
    tokenizer = TOKENIZERS[name]
    output = data.draw(some_tokens(tokenizer, 60))
    assert "".join(pieces(tokenizer, output, [], num_each)) == whole(tokenizer, [], output)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_the_text_of_an_output_continues_the_text_of_its_prompt(
    name: str, data: st.DataObject
) -> None:
    tokenizer = TOKENIZERS[name]
    output = data.draw(some_tokens(tokenizer, 20))
    prompt = data.draw(some_tokens(tokenizer, 60))
    if prompt:  # it ends with a complete character, and maybe special tokens
        ends = map(tokenizer.token_to_id, ("A", "▁A", "hello", "hello</w>"))
        prompt.append(next(token for token in ends if token is not None))
        prompt += data.draw(st.sampled_from([[], [2, 1]]))
    assert "".join(pieces(tokenizer, output, prompt)) == whole(tokenizer, prompt, output)


@pytest.mark.parametrize(
    ("name", "prompt", "output", "text"),
    [
        ("llama", "", "▁A ▁B C", "A BC"),
        ("llama", "", "▁A </s> ▁B", "A B"),
        ("llama", "", "</s> <s> ▁A </s> <s> ▁ ▁B", "A  B"),
        ("llama", "", "▁ ▁ C", " C"),
        ("llama", "▁A", "▁B", " B"),
        ("llama", "<s> ▁A <0x0A>", "▁B", " B"),
        ("llama", "<s>", "▁B", "B"),
        ("llama", "▁A <0x0A>", "<0x0A> <0xE2> <0x82> <0xAC> C", "\n€C"),
        ("llama", "▁A", "<0xFF> C <0xE2> C", "\ufffdC\ufffdC"),
        ("metaspace", "▁A", "</s> ▁B", " B"),
        ("wordpiece", "hello", "##s not .", "s not."),
        ("bpe with suffix", "hello</w>", "a</w> s a</w>", " a sa"),
        ("byte-level", "A", "Ġthe </s> Ã © Ġthe", " theé the"),
    ],
)
def test_outputs_after_prompts(name: str, prompt: str, output: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    before, after = tokens_of(tokenizer, prompt), tokens_of(tokenizer, output)
    assert whole(tokenizer, before, after) == text
    assert "".join(pieces(tokenizer, after, before)) == text


def test_an_output_that_completes_a_character_of_its_prompt_loses_nothing_after_it() -> None:
    tokenizer = TOKENIZERS["llama"]
    before, after = tokens_of(tokenizer, "<0xE2> <0x82>"), tokens_of(tokenizer, "<0xAC> C ▁A")
    assert "".join(pieces(tokenizer, after, before)) == "C A"


# What is held back

ENDLESS = [
    ("byte-level", "ÿ"),  # never the start of a character
    ("byte-level", "¬"),  # never the start of a character, but the end of many
    ("byte-level", "â"),  # the start of a character that never goes on
    ("byte-level", "â Ĥ"),
    ("byte-level", "ð Ł A"),
    ("byte-level", "â Ĥ ¬"),
    ("llama", "<0xFF>"),
    ("llama", "<0xAC>"),
    ("llama", "<0xE2>"),
    ("llama", "<0xE2> <0x82>"),
    ("llama", "<0xE2> C"),
    ("llama", "\ufffd"),
    ("gemma", "<0xF0> <0x9F>"),
    ("metaspace", "▁"),
    ("wordpiece", "##"),
]


@pytest.mark.parametrize(("name", "words"), ENDLESS)
def test_endless_tokens_are_shown_up_to_one_character(name: str, words: str) -> None:
    tokenizer = TOKENIZERS[name]
    output = (tokens_of(tokenizer, words) * 200)[:200]
    decoder, shown = Detokenizer(tokenizer).decoder(), ""
    for end, token in enumerate(output, 1):
        shown += decoder.feed([token])
        text = tokenizer.decode(output[:end])
        assert len(text) - len(shown) <= 2  # the bytes of an incomplete character
    assert shown + decoder.finish() == tokenizer.decode(output)


def test_characters_of_an_endless_run_of_bytes_are_shown() -> None:
    tokenizer = TOKENIZERS["llama"]
    euro = tokens_of(tokenizer, "<0xE2> <0x82> <0xAC>")
    decoder, shown = Detokenizer(tokenizer).decoder(), ""
    for number in range(1, 200):
        shown += decoder.feed(euro)
        assert 3 * (number - len(shown)) <= MAX_HELD_BYTES
    assert shown + decoder.finish() == 199 * "€"


def test_after_a_long_run_broken_bytes_leave_the_shown_characters_as_they_are() -> None:
    tokenizer = TOKENIZERS["llama"]
    euro, broken = tokens_of(tokenizer, "<0xE2> <0x82> <0xAC>"), tokens_of(tokenizer, "<0xFF> ▁A")
    text = "".join(pieces(tokenizer, [*euro * 12, *broken], []))
    assert text.startswith(11 * "€")
    assert text.endswith("\ufffd A")


class Counting(Detokenizer):
    """Counts the tokens that are decoded."""

    num_decoded = 0

    def decode(self, tokens: list[int]) -> str:  # type: ignore[override]
        self.num_decoded += len(tokens)
        return super().decode(tokens)


@pytest.mark.parametrize(("name", "words"), [*ENDLESS, ("llama", "<0xE2> <0x82> <0xAC>")])
def test_the_work_is_linear(name: str, words: str) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = Counting(tokenizer)
    decoder = tokens.decoder(tokens_of(tokenizer, words) * 500)
    tokens.num_decoded = 0
    for token in tokens_of(tokenizer, words) * 500:
        decoder.feed([token])
    num_fed = 500 * len(words.split())
    assert tokens.num_decoded < 80 * num_fed
