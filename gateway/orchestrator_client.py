"""The orchestrator as the gateway sees it: calls, and what it says about its models."""

import asyncio
import json
import logging

import grpc
import grpc.aio

from amusd.fleet.endpoint import parse_endpoint
from amusd.rpc.channel import MAX_MESSAGE_BYTES, channel_options
from amusd.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from gateway.api_errors import ApiError, of_call, unavailable

log = logging.getLogger(__name__)

_INFO_SECONDS = 10.0
_REFRESH_SECONDS = 5.0
_RETRY_SECONDS = 0.25
# Several orchestrators behind one name share the calls.
_BALANCING = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})

Call = grpc.aio.UnaryStreamCall[orchestrator_pb2.GenerateRequest, orchestrator_pb2.GenerateResponse]


class OrchestratorClient:
    """A channel to the orchestrator; ``keep_informed`` runs as long as it is used."""

    def __init__(self, address: str, use_proxy: bool, request_seconds: float) -> None:
        """Connect to ``host:port``; a generation may take ``request_seconds``.

        Raises:
            InvalidInputError: the address is not of this form.
        """
        endpoint = parse_endpoint(address)
        options = [*channel_options(endpoint, use_proxy), ("grpc.service_config", _BALANCING)]
        self._channel = grpc.aio.insecure_channel(str(endpoint), options)
        self._stub = orchestrator_pb2_grpc.OrchestratorServiceStub(self._channel)
        self._request_seconds = request_seconds
        self._info: orchestrator_pb2.GetServerInfoResponse | None = None

    async def keep_informed(self) -> None:
        """Ask for the models now and then, until cancelled."""
        while True:
            try:
                await self.ask()
                await asyncio.sleep(_REFRESH_SECONDS)
            except ApiError as error:
                log.debug("the orchestrator does not answer: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)

    async def ask(self, seconds: float = _INFO_SECONDS) -> orchestrator_pb2.GetServerInfoResponse:
        """Return what the orchestrator says of itself now.

        Raises:
            ApiError: it does not answer within ``seconds``, or is not ready.
        """
        request = orchestrator_pb2.GetServerInfoRequest()
        try:
            self._info = await self._stub.GetServerInfo(request, timeout=seconds)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise unavailable(f"the orchestrator does not answer in {seconds:g} s") from error
            raise of_call(error) from error
        return self._info

    async def info(self) -> orchestrator_pb2.GetServerInfoResponse:
        """Return what the orchestrator has said last; ask if it has not said anything yet.

        Raises:
            ApiError: as for ``ask``.
        """
        return self._info if self._info is not None else await self.ask()

    def generate(self, request: orchestrator_pb2.GenerateRequest) -> Call:
        """Start a call, which its caller cancels.

        Raises:
            ApiError: the request is larger than a message may be.
        """
        num_bytes = request.ByteSize()
        if num_bytes > MAX_MESSAGE_BYTES:
            raise ApiError(
                413, f"the request has {num_bytes} bytes: send at most {MAX_MESSAGE_BYTES}"
            )
        return self._stub.Generate(request, timeout=self._request_seconds)

    async def close(self) -> None:
        """Close the channel, which ends its calls."""
        await self._channel.close(None)
