"""A Python client of the orchestrator: a prompt in, text and tokens out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import grpc

from amusd.analysis.generation_statistics import Statistics
from amusd.analysis.timeline import Timeline
from amusd.prompts import Prompt
from amusd.protocol.errors import InvalidInputError, UnavailableError
from amusd.protocol.finish import FinishReason
from amusd.protocol.strategy import Strategy
from amusd.rpc import codec, faults, timeline_codec
from amusd.rpc.channel import open_blocking_channel
from amusd.v1 import orchestrator_pb2, orchestrator_pb2_grpc


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


@dataclass(slots=True)
class Generation:
    """One output. Iterate over it to read its text; its other fields are complete at the end."""

    _responses: Iterator[orchestrator_pb2.GenerateResponse]
    _address: str
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    statistics: Statistics | None = None
    timeline: Timeline | None = None
    strategy: Strategy | None = None

    def __iter__(self) -> Iterator[str]:
        """Yield text as its tokens become final.

        Raises:
            AmusdError: the server refuses the request, or cannot be reached.
        """
        try:
            for response in self._responses:
                text = self._take(response)
                if text:
                    yield text
        except grpc.RpcError as error:
            raise faults.error_of(error, f"orchestrator at {self._address}") from error

    def wait(self) -> "Generation":
        """Read the output to its end and return self."""
        for _ in self:
            pass
        return self

    def summary(self) -> Statistics:
        """Return the statistics; the output must have been read to its end.

        Raises:
            UnavailableError: the server ended the output without a completion.
        """
        if self.statistics is None:
            raise UnavailableError("the output ended without a completion")
        return self.statistics

    def _take(self, response: orchestrator_pb2.GenerateResponse) -> str:
        if response.HasField("chunk"):
            self.tokens.extend(response.chunk.token_ids)
            text = response.chunk.text
        else:
            completion = response.completion
            self.finish_reason = codec.finish_reason_from_proto(completion.finish_reason)
            self.statistics = codec.statistics_from_proto(completion.statistics)
            number = completion.statistics.strategy
            if number:
                self.strategy = codec.strategy_from_proto(number, Strategy.AMUSD)
            if completion.HasField("timeline"):
                self.timeline = timeline_codec.timeline_from_proto(completion.timeline)
            text = completion.text
        self.text += text
        return text


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
        """Close the connection, which ends running generations."""
        self._channel.close()

    def generate(self, prompt: Prompt, options: Options = Options()) -> Generation:
        """Start a generation; iterate over the result to read it.

        Raises:
            InvalidInputError: the prompt holds lone surrogates, which UTF-8 cannot encode.
        """
        request = generate_request(prompt, options)
        responses = self._stub.Generate(request, timeout=self._timeout_seconds)
        return Generation(iter(responses), self._address)

    def server_info(self) -> orchestrator_pb2.GetServerInfoResponse:
        """Return the server's models, limits and strategies.

        Raises:
            AmusdError: the server cannot be reached, or is not ready.
        """
        try:
            request = orchestrator_pb2.GetServerInfoRequest()
            return self._stub.GetServerInfo(request, timeout=self._timeout_seconds or 10.0)
        except grpc.RpcError as error:
            raise faults.error_of(error, f"orchestrator at {self._address}") from error


def generate_request(prompt: Prompt, options: Options) -> orchestrator_pb2.GenerateRequest:
    """Return the request for a prompt and options.

    Raises:
        InvalidInputError: the prompt holds lone surrogates, which UTF-8 cannot encode.
    """
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
