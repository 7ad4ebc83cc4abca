"""A Python client of the orchestrator: a prompt in, text and tokens out."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, Unpack

import grpc

from amusd.clients.chat_messages import Conversation
from amusd.clients.connection import Connection
from amusd.clients.outputs import Completion, Output, Piece, PositionLogprobs, TokenLogprob
from amusd.clients.request_building import AnyPrompt, chat_request, generate_request
from amusd.clients.request_options import NO_OPTIONS, OptionFields, Options
from amusd.protocol.errors import PreconditionError
from amusd.v1 import orchestrator_pb2, orchestrator_pb2_grpc

__all__ = [
    "Client", "Completion", "Generation", "Options", "Piece", "PositionLogprobs", "TokenLogprob",
]  # fmt: skip

_CLOSED = "the client is closed: make a new one"
_INFO_SECONDS = 10.0


class ResponseStream(Protocol):
    """A running call."""

    def __iter__(self) -> Iterator[orchestrator_pb2.GenerateResponse]:
        """Iterate over the responses as they come."""

    def cancel(self) -> object:
        """End the call; without effect on a call that has ended."""


class Generation(Output):
    """Output that is being generated. Iterate over it to read its pieces.

    It runs from its creation. It ends early when a loop over it is left, at the end of a ``with``
    block, with ``close``, or when nothing refers to it any more.
    """

    def __init__(
        self, responses: ResponseStream, connection: Connection, num_completions: int = 1
    ) -> None:
        """Read a call that runs already."""
        super().__init__(num_completions)
        self._responses = responses
        self._connection = connection
        self._is_closed = False

    def __iter__(self) -> Iterator[Piece]:
        """Yield pieces as tokens become final. Leaving the loop ends the generation.

        Raises:
            AmusdError: the server refuses the request, or cannot be reached.
        """
        if self._is_closed:
            return
        try:
            for response in self._responses:
                piece = self.take(response)
                if piece is not None:
                    yield piece
        except grpc.RpcError as error:
            if not self._is_closed:
                raise self._connection.error_of(error) from error
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


class Client:
    """A connection to an orchestrator. It may be used by several threads at once."""

    def __init__(
        self,
        address: str = "localhost:50050",
        timeout_seconds: float | None = None,
        use_proxy: bool = False,
        *,
        tls: bool = False,
        ca: str | Path | bytes | None = None,
        api_key: str = "",
        max_attempts: int = 3,
    ) -> None:
        """Connect to ``host:port``.

        Args:
            address: where the orchestrator listens.
            timeout_seconds: bounds each call from its start to its end, all attempts together.
            use_proxy: connect through the proxy that ``grpc_proxy``, ``https_proxy`` or
                ``http_proxy`` names in the environment.
            tls: encrypt the connection.
            ca: certificates to trust, a PEM file or its content; it implies ``tls``.
            api_key: sent with each call as ``authorization: Bearer``.
            max_attempts: how often a call is made while nothing of its answer has come, 1 to 5.
                Another attempt follows if the server cannot be reached, or has no room.

        Raises:
            InvalidInputError: an argument is of no use; the error says why.
        """
        self._connection = Connection(address, use_proxy, tls, ca, api_key, max_attempts)
        self._timeout_seconds = timeout_seconds
        self._channel = self._connection.open()
        self._stub = orchestrator_pb2_grpc.OrchestratorServiceStub(self._channel)

    def __enter__(self) -> Self:
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

    def generate(
        self, prompt: AnyPrompt, options: Options = NO_OPTIONS, **changes: Unpack[OptionFields]
    ) -> Generation:
        """Start to continue a text, token ids or a conversation; read the result by iteration.

        Options are given as ``Options``, by keyword, or both; see ``Options`` for all of them.

        Raises:
            InvalidInputError: prompt or options are of no use; the error names what is wrong.
            PreconditionError: the client is closed.
        """
        options = replace(options, **changes)
        return self._start(generate_request(prompt, options), options)

    def chat(
        self,
        conversation: Conversation,
        options: Options = NO_OPTIONS,
        **changes: Unpack[OptionFields],
    ) -> Generation:
        """Start to answer a question, or a conversation in the format of the OpenAI API.

        Options and errors are those of ``generate``.
        """
        options = replace(options, **changes)
        return self._start(chat_request(conversation, options), options)

    def server_info(self) -> orchestrator_pb2.GetServerInfoResponse:
        """Return the server's models, limits and strategies.

        Raises:
            AmusdError: the server cannot be reached, or is not ready; or the client is closed.
        """
        try:
            return self._stub.GetServerInfo(
                orchestrator_pb2.GetServerInfoRequest(),
                timeout=self._timeout_seconds or _INFO_SECONDS,
                metadata=self._connection.metadata,
            )
        except ValueError as error:  # of a closed channel
            raise PreconditionError(_CLOSED) from error
        except grpc.RpcError as error:
            raise self._connection.error_of(error) from error

    def _start(self, request: orchestrator_pb2.GenerateRequest, options: Options) -> Generation:
        try:
            responses = self._stub.Generate(
                request, timeout=self._timeout_seconds, metadata=self._connection.metadata
            )
        except ValueError as error:  # of a closed channel
            raise PreconditionError(_CLOSED) from error
        return Generation(responses, self._connection, options.n)
