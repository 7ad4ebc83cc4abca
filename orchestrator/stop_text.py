"""Stop texts: found in a text that comes in pieces, without a look at anything twice.

Rules of this file
- It is pure: strings in, strings out.
- The stop text that ends first ends the output. If several end there, it is the longest.
- Text that may be the beginning of a stop text is held back until that is decided. A text that
  includes its stop text needs no holding back.
"""

from collections.abc import Iterable

from amusd.protocol.errors import InvalidInputError

MAX_STOP_TEXTS = 16
MAX_STOP_TEXT_BYTES = 1024


class StopTexts:
    """The stop texts of a request, prepared once for all of its outputs."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Prepare ``texts``.

        Raises:
            InvalidInputError: there are too many, or one is empty or too long.
        """
        given = list(texts)
        if len(given) > MAX_STOP_TEXTS:
            raise InvalidInputError(f"stop has {len(given)} texts: send at most {MAX_STOP_TEXTS}")
        for text in given:
            size = len(text.encode())
            if not 1 <= size <= MAX_STOP_TEXT_BYTES:
                raise InvalidInputError(
                    f"a text of stop has {size} bytes: use 1 to {MAX_STOP_TEXT_BYTES}"
                )
        self.texts = tuple(dict.fromkeys(given))
        self.borders = tuple(_borders(text) for text in self.texts)
        self.first_characters = frozenset(text[0] for text in self.texts)

    def __bool__(self) -> bool:
        """Return whether there are any."""
        return bool(self.texts)


class StopMatcher:
    """Finds the first stop text in the text of one output.

    For each stop text it knows how many of its characters the text so far ends with, as the
    algorithm of Knuth, Morris and Pratt does. So the time is linear in the text.
    """

    def __init__(self, stops: StopTexts, includes_stop: bool = False) -> None:
        """Start with an empty text; with ``includes_stop`` the result includes the stop text."""
        self.found: str | None = None
        """The stop text that ended the text."""
        self._stops = stops
        self._includes_stop = includes_stop
        self._num_matched = [0] * len(stops.texts)
        self._held = ""

    @property
    def num_held(self) -> int:
        """Characters that are held back."""
        return len(self._held)

    def feed(self, text: str) -> str:
        """Add ``text``; return what is certain to belong to the result and was not returned yet.

        Once a stop text is found, further text is dropped.
        """
        if self.found is not None:
            return ""
        if self._stops.first_characters.isdisjoint(text) and not any(self._num_matched):
            return text
        num_before = len(self._held)
        self._held += text
        for end, character in enumerate(text, num_before + 1):
            self.found = self._step(character)
            if self.found is not None:
                kept = self._held[: end if self._includes_stop else end - len(self.found)]
                self._held = ""
                return kept
        num_held = 0 if self._includes_stop else max(self._num_matched)
        return self._release(len(self._held) - num_held)

    def would_end(self, text: str) -> bool:
        """Return whether ``text`` would complete a stop text; nothing changes."""
        before = self._num_matched.copy()
        ends = any(self._step(character) is not None for character in text)
        self._num_matched = before
        return ends

    def finish(self) -> str:
        """Return the text that was held back; the output is over."""
        return self._release(len(self._held))

    def _release(self, num_characters: int) -> str:
        released, self._held = self._held[:num_characters], self._held[num_characters:]
        return released

    def _step(self, character: str) -> str | None:
        """Add a character; return the longest stop text that ends with it."""
        ended: str | None = None
        for index, stop in enumerate(self._stops.texts):
            num, borders = self._num_matched[index], self._stops.borders[index]
            while num and stop[num] != character:
                num = borders[num]
            num += stop[num] == character
            if num == len(stop):
                if ended is None or len(stop) > len(ended):
                    ended = stop
                num = borders[num]
            self._num_matched[index] = num
        return ended


def _borders(text: str) -> tuple[int, ...]:
    """Return for each n the longest proper prefix of ``text[:n]`` that is also its suffix."""
    borders, num = [0, 0], 0
    for character in text[1:]:
        while num and text[num] != character:
            num = borders[num]
        num += text[num] == character
        borders.append(num)
    return tuple(borders)
