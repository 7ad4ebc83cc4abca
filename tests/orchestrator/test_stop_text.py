"""Stop texts: the first one that ends is found, whatever the pieces, and little is held back."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from amusd.protocol.errors import InvalidInputError
from orchestrator.stop_text import StopMatcher, StopTexts

FEW = st.text("ab", min_size=1, max_size=5)
STOPS = st.lists(FEW, min_size=1, max_size=4)
PIECES = st.lists(st.text("abé", max_size=6), max_size=12)


def expected(text: str, stops: list[str], includes_stop: bool) -> tuple[str, str | None]:
    """Return the result by ``str.find`` on the whole text."""
    ends = {stop: text.find(stop) + len(stop) for stop in stops if stop in text}
    if not ends:
        return text, None
    end = min(ends.values())
    found = max((stop for stop in ends if ends[stop] == end), key=len)
    return text[: end if includes_stop else end - len(found)], found


@given(STOPS, PIECES, st.booleans())
@example(["aab"], ["a", "aa", "b"], False)
@example(["ab", "b"], ["a", "b"], False)
@example(["abab", "ba"], ["ab", "ab"], True)
def test_any_pieces_give_what_str_find_gives(
    stops: list[str], pieces: list[str], includes_stop: bool
) -> None:
    matcher = StopMatcher(StopTexts(stops), includes_stop)
    text = "".join([*(matcher.feed(piece) for piece in pieces), matcher.finish()])
    assert (text, matcher.found) == expected("".join(pieces), stops, includes_stop)


@given(STOPS, PIECES)
def test_only_what_may_begin_a_stop_text_is_held_back(stops: list[str], pieces: list[str]) -> None:
    matcher, shown, whole = StopMatcher(StopTexts(stops)), "", ""
    for piece in pieces:
        shown += matcher.feed(piece)
        whole += piece
        if matcher.found is not None:
            break
        held = [
            size
            for stop in stops
            for size in range(len(stop))
            if whole.endswith(stop[:size])  # a proper prefix, at least the empty one
        ]
        assert (shown, matcher.num_held) == (whole[: len(whole) - max(held)], max(held))


@given(STOPS, PIECES)
def test_a_text_that_includes_its_stop_text_is_never_held_back(
    stops: list[str], pieces: list[str]
) -> None:
    matcher, shown, whole = StopMatcher(StopTexts(stops), includes_stop=True), "", ""
    for piece in pieces:
        shown += matcher.feed(piece)
        whole += piece
        assert shown == expected(whole, stops, True)[0]


@given(STOPS, PIECES, st.text("ab", max_size=6))
def test_would_end_foresees_feed_and_changes_nothing(
    stops: list[str], pieces: list[str], text: str
) -> None:
    matcher, other = StopMatcher(StopTexts(stops)), StopMatcher(StopTexts(stops))
    for piece in pieces:
        matcher.feed(piece)
        other.feed(piece)
        if matcher.found is not None:
            return
    foreseen = matcher.would_end(text)
    assert matcher.feed(text) == other.feed(text)
    assert foreseen == (matcher.found is not None)


def test_nothing_follows_a_stop_text() -> None:
    matcher = StopMatcher(StopTexts(["stop"]))
    assert matcher.feed("a st") == "a "
    assert matcher.feed("op b") == ""
    assert (matcher.found, matcher.feed("more"), matcher.finish()) == ("stop", "", "")


@pytest.mark.parametrize(
    ("stops", "message"),
    [
        ([""], "has 0 bytes: use 1 to 1024"),
        (["a", ""], "has 0 bytes"),
        (["é" * 513], "has 1026 bytes"),
        (["a"] * 17, "stop has 17 texts: send at most 16"),
    ],
)
def test_stop_texts_out_of_range_are_refused(stops: list[str], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        StopTexts(stops)


def test_stop_texts_up_to_the_limits_are_accepted() -> None:
    stops = StopTexts([chr(97 + number) * 1024 for number in range(16)])
    matcher = StopMatcher(stops)
    assert matcher.feed("p" * 1023 + "o") == "p" * 1023
    assert matcher.feed("o" * 1023) == ""
    assert matcher.found == "o" * 1024
    assert not StopTexts([])
