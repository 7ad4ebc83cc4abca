"""One output on its way to the client: final tokens in, chunks of tokens and text out.

Rules of this file
- Nothing waits, and nothing is written: the client's outbox does that.
- Without stop texts, tokens are decoded when a chunk is taken, many at once. With stop texts they
  are decoded one by one before they are final, because their text decides where the output ends.
- The output ends with the first token at which its text, decoded up to there, contains a stop text.
- A token whose whole text is held back is held back, too.
"""

from collections import deque
from dataclasses import dataclass

from amusd.sampling.parameters import TokenLogprobs
from orchestrator.detokenizer import TextDecoder
from orchestrator.emission import Emission
from orchestrator.stop_text import MAX_STOP_TEXT_BYTES, StopMatcher

_MAX_CHUNK_TOKENS = 1 << 10  # decoded at once; others have their turn between two chunks
_MAX_CHUNK_LOGPROBS = 1 << 12  # the same
# Each token with text holds back a byte or more. So this is exceeded by tokens without text only.
_MAX_HELD_TOKENS = 2 * MAX_STOP_TEXT_BYTES


@dataclass(frozen=True, slots=True)
class OutputChunk:
    """A part of an output: tokens, their text, and what the request asked for about them.

    ``begins_text`` says that the first token begins a text of its own. A chunk has tokens or
    log-probabilities of the prompt, or both.
    """

    index: int
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    begins_text: bool = False


class CompletionOutput:
    """The output of one completion."""

    def __init__(
        self,
        index: int,
        decoder: TextDecoder,
        stop: StopMatcher | None = None,
        min_tokens: int = 0,
        begins_text: bool = False,
    ) -> None:
        """Start the output of completion ``index``.

        Args:
            index: which of the request's completions it is, from 0.
            decoder: decodes its tokens.
            stop: finds the stop text that ends it; None: there are none.
            min_tokens: stop texts are found behind so many tokens.
            begins_text: whether it is a text of its own, and does not continue the prompt.
        """
        self.index = index
        self.last_token: int | None = None
        """The last of the tokens so far."""
        self._decoder = decoder
        self._stop = stop
        self._min_tokens = min_tokens
        self._begins_text = begins_text
        self._tokens: list[int] = []
        self._texts: list[str] = []  # with stop texts only: what each token adds to the result
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._num_decoded = 0
        self._num_characters = 0
        self._held: deque[int] = deque()  # where the texts of held tokens begin, in characters

    @property
    def num_waiting(self) -> int:
        """Tokens that were not taken yet."""
        return len(self._tokens)

    @property
    def stop_text(self) -> str | None:
        """The stop text that ended the output."""
        return self._stop.found if self._stop is not None else None

    def find_end(self, tokens: tuple[int, ...]) -> int | None:
        """Decode tokens before they are final; return after how many a stop text ends the output.

        ``put`` follows with those tokens.
        """
        stop = self._stop
        if stop is None:
            return None
        for number, token in enumerate(tokens, 1):
            self._texts.append(self._decode_one(token, stop))
            if stop.found is not None:
                self._held.clear()
                return number
        shown = self._num_characters - stop.num_held
        while self._held and (not stop.num_held or self._held[0] < shown):
            self._held.popleft()
        if len(self._held) > _MAX_HELD_TOKENS:
            self._held.clear()
        return None

    def put(self, emission: Emission) -> None:
        """Add final tokens."""
        self._tokens.extend(emission.tokens)
        self._logprobs.extend(emission.logprobs)
        self._prompt_logprobs.extend(emission.prompt_logprobs)
        self.last_token = emission.tokens[-1]

    def take(self) -> OutputChunk | None:
        """Remove and return the next chunk; None: there is nothing to send now."""
        prompt_logprobs = self._prompt_logprobs[: _num_positions(self._prompt_logprobs)]
        room = _num_positions(self._logprobs) - len(prompt_logprobs)
        num_ready = len(self._tokens) - len(self._held)
        num = max(0, min(_MAX_CHUNK_TOKENS, room, num_ready))
        if not num and not prompt_logprobs:
            return None
        tokens, logprobs = tuple(self._tokens[:num]), tuple(self._logprobs[:num])
        begins_text = self._begins_text
        self._begins_text = begins_text and not num
        chunk = OutputChunk(
            self.index, tokens, self._text_of(tokens), logprobs, tuple(prompt_logprobs), begins_text
        )
        del self._tokens[:num], self._logprobs[:num]
        del self._prompt_logprobs[: len(prompt_logprobs)]
        return chunk

    def close(self) -> None:
        """Hold no token back any more: the output is over."""
        self._held.clear()

    def finish(self) -> str:
        """Return the text that was held back; the last call. It may end with a stop text."""
        rest = self._decoder.finish() if self.stop_text is None else ""
        if self._stop is None:
            return rest
        return self._searched(rest, self._stop) + self._stop.finish()

    def _decode_one(self, token: int, stop: StopMatcher) -> str:
        """Decode a token and return the text that it adds to the result."""
        self._num_decoded += 1
        self._held.append(self._num_characters)
        text = self._decoder.feed((token,))
        self._num_characters += len(text)
        shown = self._searched(text, stop)
        if stop.found is None and self._num_decoded > self._min_tokens:
            pending = self._decoder.pending()
            if pending and stop.would_end(pending):
                shown += stop.feed(pending)
        return shown

    def _searched(self, text: str, stop: StopMatcher) -> str:
        return stop.feed(text) if self._num_decoded > self._min_tokens else text

    def _text_of(self, tokens: tuple[int, ...]) -> str:
        """Return the text of the next tokens."""
        if self._stop is None:
            return self._decoder.feed(tokens) if tokens else ""
        text = "".join(self._texts[: len(tokens)])
        del self._texts[: len(tokens)]
        return text


def _num_positions(logprobs: list[TokenLogprobs]) -> int:
    """Return how many positions fit a chunk, by the number of likeliest tokens at each."""
    return _MAX_CHUNK_LOGPROBS // (1 + len(logprobs[0].top) if logprobs else 1)
