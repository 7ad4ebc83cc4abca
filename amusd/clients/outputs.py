"""Outputs as they are read: pieces of text, and what is known of each completion."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

from amusd.analysis.generation_statistics import Statistics
from amusd.analysis.timeline import Timeline
from amusd.protocol.errors import UnavailableError
from amusd.protocol.finish import FinishReason
from amusd.protocol.strategy import Strategy
from amusd.rpc import codec, statistics_codec, timeline_codec
from amusd.v1 import orchestrator_pb2, sampling_pb2


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability.

    ``raw`` is its text in UTF-8; a token may end within a character.
    """

    token: int
    logprob: float
    raw: bytes = b""

    @property
    def text(self) -> str:
        """The text; bytes that are a part of a character only become U+FFFD."""
        return self.raw.decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """Log-probabilities at one position: of the token there, and of the likeliest, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


class Piece(str):
    """Text of an output that became final, and its tokens; one of them may be empty.

    Special tokens have no text, and the text of an incomplete character comes with a later piece.
    ``index`` is the completion that it belongs to. ``logprobs`` has an entry for each token, and
    ``prompt_logprobs`` one for each token of the prompt but the first, if they were asked for.
    """

    __slots__ = ("index", "logprobs", "prompt_logprobs", "tokens")

    tokens: tuple[int, ...]
    index: int  # type: ignore[assignment]  # takes the place of the search in a string
    logprobs: tuple[PositionLogprobs, ...]
    prompt_logprobs: tuple[PositionLogprobs, ...]

    def __new__(
        cls,
        text: str,
        tokens: Iterable[int] = (),
        index: int = 0,
        logprobs: Iterable[PositionLogprobs] = (),
        prompt_logprobs: Iterable[PositionLogprobs] = (),
    ) -> Self:
        """Return a string with tokens."""
        piece = super().__new__(cls, text)
        piece.tokens, piece.index = tuple(tokens), index
        piece.logprobs, piece.prompt_logprobs = tuple(logprobs), tuple(prompt_logprobs)
        return piece

    @property
    def text(self) -> str:
        """The text as a plain string."""
        return str(self)


@dataclass(slots=True)
class Completion:
    """One completion of a prompt. Text and tokens grow; the other fields are set at its end.

    ``seed`` is the one that the tokens were sampled with; 0 for greedy decoding. With the finish
    reason STOP, ``stop_text`` or ``stop_token_id`` is what ended the output, unless a constraint
    did. ``session_id`` is its name in the logs of the services.
    """

    index: int = 0
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    statistics: Statistics | None = None
    timeline: Timeline | None = None
    strategy: Strategy | None = None
    seed: int | None = None
    stop_text: str = ""
    stop_token_id: int | None = None
    session_id: str = ""

    def add(self, piece: Piece) -> None:
        """Append a piece."""
        self.tokens.extend(piece.tokens)
        self.logprobs.extend(piece.logprobs)
        self.text += piece

    def end(self, message: orchestrator_pb2.Completion) -> None:
        """Fill in what is known at the end."""
        self.finish_reason = codec.finish_reason_from_proto(message.finish_reason)
        self.statistics = statistics_codec.statistics_from_proto(message.statistics)
        if message.statistics.strategy:
            self.strategy = codec.strategy_from_proto(message.statistics.strategy, Strategy.AMUSD)
        if message.HasField("timeline"):
            self.timeline = timeline_codec.timeline_from_proto(message.timeline)
        if message.HasField("stop_token_id"):
            self.stop_token_id = message.stop_token_id
        self.seed, self.stop_text = message.seed, message.stop_text
        self.session_id = message.session_id


class Output:
    """What was read of a response stream; it does no input or output.

    All fields but ``completions`` and ``prompt_logprobs`` are those of the first completion.
    """

    def __init__(self, num_completions: int = 1) -> None:
        """Start with empty completions."""
        self.completions = [Completion(index) for index in range(num_completions)]
        self.prompt_logprobs: list[PositionLogprobs] = []

    def take(self, response: orchestrator_pb2.GenerateResponse) -> Piece | None:
        """Keep a response and return its piece; None if it has neither text nor tokens."""
        if response.HasField("chunk"):
            chunk = response.chunk
            piece = Piece(
                chunk.text,
                chunk.token_ids,
                chunk.index,
                _logprobs(chunk.logprobs),
                _logprobs(chunk.prompt_logprobs),
            )
        else:
            piece = Piece(response.completion.text, index=response.completion.index)
            self._completion(piece.index).end(response.completion)
        self._completion(piece.index).add(piece)
        self.prompt_logprobs.extend(piece.prompt_logprobs)
        return piece if piece or piece.tokens else None

    def _completion(self, index: int) -> Completion:
        if index >= len(self.completions):
            raise UnavailableError(
                f"the server sent completion {index}, of {len(self.completions)} asked for: "
                "use a server of this client's version"
            )
        return self.completions[index]

    @property
    def tokens(self) -> list[int]:
        """The tokens so far."""
        return self.completions[0].tokens

    @property
    def text(self) -> str:
        """The text so far."""
        return self.completions[0].text

    @property
    def logprobs(self) -> list[PositionLogprobs]:
        """Log-probabilities of the tokens so far; empty if none were asked for."""
        return self.completions[0].logprobs

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the output ended; None before its end."""
        return self.completions[0].finish_reason

    @property
    def statistics(self) -> Statistics | None:
        """Counts and times; None before the end."""
        return self.completions[0].statistics

    @property
    def timeline(self) -> Timeline | None:
        """The record of all messages; None before the end, and if none was asked for."""
        return self.completions[0].timeline

    @property
    def strategy(self) -> Strategy | None:
        """The strategy that the server used; None before the end."""
        return self.completions[0].strategy

    @property
    def seed(self) -> int | None:
        """The seed that the tokens were sampled with, 0 for greedy; None before the end."""
        return self.completions[0].seed

    def summary(self) -> Statistics:
        """Return the statistics; the output must have been read to its end.

        Raises:
            UnavailableError: the output ended without a completion, or was not read to its end.
        """
        if self.statistics is None:
            raise UnavailableError(
                "the output has no completion: read it to its end before its statistics"
            )
        return self.statistics


def _logprobs(positions: Sequence[sampling_pb2.PositionLogprobs]) -> list[PositionLogprobs]:
    return [
        PositionLogprobs(_logprob(one.token), tuple(_logprob(token) for token in one.top))
        for one in positions
    ]


def _logprob(token: sampling_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(token.token_id, token.logprob, token.text)
