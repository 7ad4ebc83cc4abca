"""A Python client of the orchestrator: a prompt in, text and tokens out."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

import grpc

from amusd.analysis.generation_statistics import Statistics
from amusd.analysis.timeline import Timeline
from amusd.prompts import Prompt
from amusd.protocol.errors import InvalidInputError, PreconditionError, UnavailableError
from amusd.protocol.finish import FinishReason
from amusd.protocol.strategy import Strategy
from amusd.rpc import codec, faults, statistics_codec, timeline_codec
from amusd.rpc.channel import open_blocking_channel
from amusd.v1 import orchestrator_pb2, orchestrator_pb2_grpc

_CLOSED = "the client is closed: make a new one"
_MAX_INT32 = 2**31 - 1
_MAX_UINT32 = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a generation; None leaves the choice to the server.

    ``timeline`` asks for a record of all messages and device times.
    """

    strategy: Strategy | None = None
    max_tokens: int | None = None
    lookahead: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    timeline: bool = False


class Piece(str):
    """Text of an output that became final, and its tokens; one of them may be empty.

    Special tokens have no text, and the text of an incomplete character comes with a later piece.
    """

    __slots__ = ("tokens",)

    tokens: tuple[int, ...]

    def __new__(cls, text: str, tokens: Iterable[int] = ()) -> Self:
        """Return a string with tokens."""
        piece = super().__new__(cls, text)
        piece.tokens = tuple(tokens)
        return piece

    @property
    def text(self) -> str:
        """The text as a plain string."""
        return str(self)


class ResponseStream(Protocol):
    """A running call."""

    def __iter__(self) -> Iterator[orchestrator_pb2.GenerateResponse]:
        """Iterate over the responses as they come."""

    def cancel(self) -> object:
        """End the call; without effect on a call that has ended."""


@dataclass(slots=True)
class Generation:
    """One output. Iterate over it to read its pieces; its other fields are complete at the end.

    It runs from its creation. It ends early when a loop over it is left, at the end of a ``with``
    block, with ``close``, or when nothing refers to it any more.
    """

    _responses: ResponseStream
    _address: str
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    statistics: Statistics | None = None
    timeline: Timeline | None = None
    strategy: Strategy | None = None
    _is_closed: bool = False

    def __iter__(self) -> Iterator[Piece]:
        """Yield pieces as tokens become final. Leaving the loop ends the generation.

        Raises:
            AmusdError: the server refuses the request, or cannot be reached.
        """
        if self._is_closed:
            return
        try:
            for response in self._responses:
                piece = self._take(response)
                if piece or piece.tokens:
                    yield piece
        except grpc.RpcError as error:
            if not self._is_closed:
                raise faults.error_of(error, f"orchestrator at {self._address}") from error
        finally:
            self.close()

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the generation if it still runs."""
        self.close()

    def close(self) -> None:
        """End the generation if it still runs, in all services; what was read stays."""
        self._is_closed = True
        self._responses.cancel()

    def wait(self) -> Self:
        """Read the output to its end and return self.

        Raises:
            AmusdError: as for iteration.
        """
        for _ in self:
            pass
        return self

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

    def _take(self, response: orchestrator_pb2.GenerateResponse) -> Piece:
        if response.HasField("chunk"):
            piece = Piece(response.chunk.text, response.chunk.token_ids)
        else:
            completion = response.completion
            self.finish_reason = codec.finish_reason_from_proto(completion.finish_reason)
            self.statistics = statistics_codec.statistics_from_proto(completion.statistics)
            number = completion.statistics.strategy
            if number:
                self.strategy = codec.strategy_from_proto(number, Strategy.AMUSD)
            if completion.HasField("timeline"):
                self.timeline = timeline_codec.timeline_from_proto(completion.timeline)
            piece = Piece(completion.text)
        self.tokens.extend(piece.tokens)
        self.text += piece
        return piece


class Client:
    """A connection to an orchestrator."""

    def __init__(
        self, address: str, timeout_seconds: float | None = None, use_proxy: bool = False
    ) -> None:
        """Connect to ``host:port``; the timeout bounds each call from its start to its end.

        With ``use_proxy`` the connection goes through the proxy that ``grpc_proxy``,
        ``https_proxy`` or ``http_proxy`` names in the environment.

        Raises:
            InvalidInputError: the address is not of this form.
        """
        self._address = address
        self._timeout_seconds = timeout_seconds
        self._channel = open_blocking_channel(address, use_proxy)
        self._stub = orchestrator_pb2_grpc.OrchestratorServiceStub(self._channel)

    def __enter__(self) -> "Client":
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection, which ends running generations."""
        self._channel.close()

    def generate(self, prompt: Prompt, options: Options = Options()) -> Generation:
        """Start a generation; iterate over the result to read it.

        Raises:
            InvalidInputError: the prompt holds lone surrogates, which UTF-8 cannot encode, or a
                number has no place in its field.
            PreconditionError: the client is closed.
        """
        request = generate_request(prompt, options)
        try:
            responses = self._stub.Generate(request, timeout=self._timeout_seconds)
        except ValueError as error:  # of a closed channel
            raise PreconditionError(_CLOSED) from error
        return Generation(responses, self._address)

    def server_info(self) -> orchestrator_pb2.GetServerInfoResponse:
        """Return the server's models, limits and strategies.

        Raises:
            AmusdError: the server cannot be reached, or is not ready; or the client is closed.
        """
        try:
            request = orchestrator_pb2.GetServerInfoRequest()
            return self._stub.GetServerInfo(request, timeout=self._timeout_seconds or 10.0)
        except ValueError as error:  # of a closed channel
            raise PreconditionError(_CLOSED) from error
        except grpc.RpcError as error:
            raise faults.error_of(error, f"orchestrator at {self._address}") from error


def generate_request(prompt: Prompt, options: Options) -> orchestrator_pb2.GenerateRequest:
    """Return the request for a prompt and options.

    Raises:
        InvalidInputError: the prompt holds lone surrogates, which UTF-8 cannot encode, or a number
            has no place in its field.
    """
    _check_range("max_tokens", options.max_tokens, _MAX_INT32)
    _check_range("lookahead", options.lookahead, _MAX_UINT32)
    for name, tokens in (("token", prompt.tokens), ("stop token", options.stop_token_ids)):
        for token in tokens:
            _check_range(name, token, _MAX_UINT32)
    request = orchestrator_pb2.GenerateRequest(
        stop_token_ids=options.stop_token_ids,
        ignore_eos=options.ignore_eos,
        timeline=options.timeline,
    )
    try:
        _set_prompt(request, prompt)
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"the prompt cannot be sent as UTF-8: {error.reason} at character {error.start}"
        ) from None
    if options.strategy is not None:
        request.strategy = codec.strategy_to_proto(options.strategy)
    if options.max_tokens is not None:
        request.max_tokens = options.max_tokens
    if options.lookahead is not None:
        request.lookahead = options.lookahead
    return request


def _check_range(name: str, number: int | None, most: int) -> None:
    """Refuse what the field of a message cannot hold; the server checks its own limits."""
    if number is not None and not 0 <= number <= most:
        raise InvalidInputError(f"{name} is {number}: a request holds 0 to {most}")


def _set_prompt(request: orchestrator_pb2.GenerateRequest, prompt: Prompt) -> None:
    if prompt.messages:
        request.chat.messages.extend(_messages(prompt.messages))
    elif prompt.tokens:
        request.tokens.ids.extend(prompt.tokens)
    else:
        request.text = prompt.text


def _messages(pairs: Sequence[tuple[str, str]]) -> Iterator[orchestrator_pb2.ChatMessage]:
    for role, content in pairs:
        yield orchestrator_pb2.ChatMessage(role=role, content=content)
