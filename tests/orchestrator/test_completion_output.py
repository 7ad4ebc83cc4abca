"""One output: where stop texts end it, what is held back, and what chunks have."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from amusd.fleet.model_description import BYTES_TOKENIZER
from amusd.sampling.parameters import TokenLogprobs
from orchestrator.completion_output import CompletionOutput, OutputChunk
from orchestrator.detokenizer import Detokenizer
from orchestrator.emission import Emission
from orchestrator.stop_text import StopMatcher, StopTexts
from orchestrator.text import load_text_codec
from tests.orchestrator.small_tokenizers import small_tokenizers
from tests.orchestrator.test_detokenizer import decoded, some_tokens, tokens_of

TOKENIZERS = small_tokenizers()
BYTES = load_text_codec(BYTES_TOKENIZER)


def bytes_output(*stops: str, includes_stop: bool = False, min_tokens: int = 0) -> CompletionOutput:
    matcher = StopMatcher(StopTexts(stops), includes_stop) if stops else None
    return CompletionOutput(0, BYTES.decoder(), matcher, min_tokens)


def given_tokens(output: CompletionOutput, tokens: tuple[int, ...]) -> int | None:
    """Give tokens to an output as a session does; return after how many it ends."""
    end = output.find_end(tokens)
    output.put(Emission(tokens[:end]))
    return end


def all_of(output: CompletionOutput) -> list[OutputChunk]:
    chunks = []
    while (chunk := output.take()) is not None:
        chunks.append(chunk)
    return chunks


class Written:
    """What a client gets of an output that is given in parts, and how many tokens it has."""

    def __init__(self, output: CompletionOutput, parts: list[list[int]]) -> None:
        chunks: list[OutputChunk] = []
        self.num_ended_at: int | None = None
        num_before = 0
        for part in parts:
            end = given_tokens(output, tuple(part)) if part else None
            chunks += all_of(output)
            if end is not None:
                self.num_ended_at = num_before + end
                break
            num_before += len(part)
        output.close()
        chunks += all_of(output)
        self.tokens = [token for chunk in chunks for token in chunk.tokens]
        self.text = "".join(chunk.text for chunk in chunks) + output.finish()


def cut(tokenizer: Tokenizer, tokens: list[int], stops: list[str]) -> tuple[int | None, str]:
    """Return where stop texts end an output and its text, by decoding each of its beginnings."""
    for end in range(1, len(tokens) + 1):
        text = decoded(tokenizer, tokens[:end])
        ends = {stop: text.find(stop) + len(stop) for stop in stops if stop in text}
        if ends:
            first = min(ends.values())
            longest = max(len(stop) for stop in ends if ends[stop] == first)
            return end, text[: first - longest]
    return None, decoded(tokenizer, tokens)


@pytest.mark.parametrize("name", ["byte-level", "llama", "gemma", "metaspace", "llama, few bytes"])
@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_an_output_ends_with_the_first_token_that_completes_a_stop_text(
    name: str, data: st.DataObject
) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = data.draw(some_tokens(tokenizer, 30))
    text = decoded(tokenizer, tokens).replace("\ufffd", "")
    starts = st.integers(0, max(0, len(text) - 1))
    stops = [
        text[start : start + data.draw(st.integers(1, 4))]
        for start in data.draw(st.lists(starts, min_size=1, max_size=3))
    ]
    stops = [stop for stop in stops if stop] or ["zzz"]
    sizes = iter(data.draw(st.lists(st.integers(1, 5), min_size=30, max_size=30)))
    parts, rest = [], tokens
    while rest:
        size = next(sizes)
        parts.append(rest[:size])
        rest = rest[size:]
    matcher = StopMatcher(StopTexts(stops))
    written = Written(CompletionOutput(0, Detokenizer(tokenizer).decoder(), matcher), parts)
    end, shown = cut(tokenizer, tokens, stops)
    assert written.num_ended_at == end
    assert written.tokens == tokens[:end]
    assert written.text == shown


def test_a_stop_text_of_byte_tokens_ends_the_output_at_once() -> None:
    tokenizer = TOKENIZERS["llama"]
    matcher = StopMatcher(StopTexts(["\n"]))
    output = CompletionOutput(0, Detokenizer(tokenizer).decoder(), matcher)
    tokens = tokens_of(tokenizer, "▁A <0x0A> ▁B")
    assert given_tokens(output, tuple(tokens)) == 2
    assert [(chunk.tokens, chunk.text) for chunk in all_of(output)] == [(tuple(tokens[:2]), "A")]


# What is held back


def test_a_token_is_held_back_with_all_of_its_text() -> None:
    output = bytes_output("xyz")
    assert given_tokens(output, tuple(b"ax")) is None
    assert [(chunk.tokens, chunk.text) for chunk in all_of(output)] == [((97,), "a")]
    assert given_tokens(output, tuple(b"y")) is None
    assert all_of(output) == []
    assert given_tokens(output, tuple(b"b")) is None
    assert [(chunk.tokens, chunk.text) for chunk in all_of(output)] == [(tuple(b"xyb"), "xyb")]


def test_the_tokens_of_a_stop_text_are_sent_and_its_text_is_not() -> None:
    output = bytes_output("xyz")
    assert given_tokens(output, tuple(b"axyzb")) == 4
    assert [(chunk.tokens, chunk.text) for chunk in all_of(output)] == [(tuple(b"axyz"), "a")]
    assert (output.finish(), output.stop_text, output.last_token) == ("", "xyz", ord("z"))


def test_the_stop_text_is_kept_on_request_and_nothing_is_held_back() -> None:
    output = bytes_output("xyz", includes_stop=True)
    assert given_tokens(output, tuple(b"ax")) is None
    assert [(chunk.tokens, chunk.text) for chunk in all_of(output)] == [(tuple(b"ax"), "ax")]
    assert given_tokens(output, tuple(b"yzb")) == 2
    assert [(chunk.tokens, chunk.text) for chunk in all_of(output)] == [(tuple(b"yz"), "yz")]


def test_an_output_that_ends_within_a_stop_text_has_all_of_its_text() -> None:
    output = bytes_output("xyz")
    given_tokens(output, tuple(b"axy"))
    output.close()
    (chunk,) = all_of(output)
    assert (chunk.tokens, chunk.text + output.finish()) == (tuple(b"axy"), "axy")
    assert output.stop_text is None


def test_tokens_without_text_are_held_back_up_to_a_limit() -> None:
    output = bytes_output("xyz")
    given_tokens(output, tuple(b"x"))
    for _ in range(2048):
        given_tokens(output, (300,))
    assert sum(len(chunk.tokens) for chunk in all_of(output)) == 2049
    assert given_tokens(output, tuple(b"yz")) == 2
    assert "".join(chunk.text for chunk in all_of(output)) + output.finish() == ""


@pytest.mark.parametrize(("min_tokens", "end"), [(0, 2), (1, 4), (2, 4), (3, None), (4, None)])
def test_stop_texts_are_found_behind_the_minimum(min_tokens: int, end: int | None) -> None:
    output = bytes_output("xy", min_tokens=min_tokens)
    assert given_tokens(output, tuple(b"xyxyab")) == end
    output.close()
    text = "".join(chunk.text for chunk in all_of(output)) + output.finish()
    assert text == ("" if end == 2 else "xy" if end == 4 else "xyxyab")


# Chunks


def logprobs_of(tokens: tuple[int, ...], num_top: int = 0) -> tuple[TokenLogprobs, ...]:
    top = tuple((rank, -1.0 - rank) for rank in range(num_top))
    return tuple(TokenLogprobs(token, -0.5, top) for token in tokens)


def test_tokens_that_are_held_back_keep_their_logprobs() -> None:
    output = bytes_output("xyz")
    for token in b"axb":
        output.find_end((token,))
        output.put(Emission((token,), logprobs_of((token,))))
        chunks = all_of(output)
        assert all(tuple(one.token for one in chunk.logprobs) == chunk.tokens for chunk in chunks)
        assert bool(chunks) == (token != ord("x"))


@pytest.mark.parametrize("num_top", [0, 20])
def test_the_logprobs_of_a_long_prompt_come_in_chunks_of_their_own(num_top: int) -> None:
    output = bytes_output()
    prompt = tuple(range(5000))
    output.put(Emission((97,), logprobs_of((97,), num_top), logprobs_of(prompt, num_top)))
    chunks = all_of(output)
    assert tuple(one.token for chunk in chunks for one in chunk.prompt_logprobs) == prompt
    assert [chunk.tokens for chunk in chunks] == [()] * (len(chunks) - 1) + [(97,)]
    assert max(len(chunk.prompt_logprobs) for chunk in chunks) * (1 + num_top) <= 4096


def test_the_logprobs_of_a_short_prompt_come_with_the_first_tokens() -> None:
    output = bytes_output()
    output.put(Emission((97, 98), logprobs_of((97, 98)), logprobs_of((1, 2, 3))))
    output.put(Emission((99,), logprobs_of((99,))))
    (chunk,) = all_of(output)
    assert (chunk.tokens, chunk.text, len(chunk.prompt_logprobs)) == ((97, 98, 99), "abc", 3)


def test_only_the_first_token_begins_a_text_of_its_own() -> None:
    output = CompletionOutput(3, BYTES.decoder(), begins_text=True)
    found = []
    for token in b"abc":
        output.put(Emission((token,)))
        found += [(chunk.index, chunk.begins_text) for chunk in all_of(output)]
    assert found == [(3, True), (3, False), (3, False)]
