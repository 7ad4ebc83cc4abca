"""The services an orchestrator drives: their channels, models and limits, checked at start."""

import asyncio
import contextlib
import logging

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from amusd.core.errors import UnavailableError
from amusd.core.model import ModelDescription, ServiceLimits, check_pair
from amusd.core.pass_size import StepTimes
from amusd.rpc import codec, faults
from amusd.rpc.channel import open_channel
from amusd.v1 import draft_pb2, draft_pb2_grpc, verify_pb2, verify_pb2_grpc

log = logging.getLogger(__name__)

_INFO_TIMEOUT_SECONDS = 10.0


class Backends:
    """One verify service and, if there is one, one draft service."""

    def __init__(self, verify_address: str, draft_address: str) -> None:
        """Prepare the channels; an empty draft address means that there is none."""
        self._verify_address = verify_address
        self._draft_address = draft_address
        self._verify_channel = open_channel(verify_address)
        self._draft_channel = open_channel(draft_address) if draft_address else None
        self.verify = verify_pb2_grpc.VerifyServiceStub(self._verify_channel)
        self.draft = (
            draft_pb2_grpc.DraftServiceStub(self._draft_channel) if self._draft_channel else None
        )
        self.verify_model: ModelDescription
        self.draft_model: ModelDescription | None = None
        self.limits: ServiceLimits
        self.step_times = StepTimes()

    @property
    def vocabulary_fingerprint(self) -> str:
        """Fingerprint that a draft model's vocabulary has to have."""
        return self.verify_model.vocabulary.fingerprint

    async def connect(self, timeout_seconds: float) -> None:
        """Wait until the services serve, and check that their models fit each other.

        A draft service that does not come is left out: it costs speed, not tokens.

        Raises:
            UnavailableError: the verify service does not serve within the timeout.
            InvalidInputError: the two models have different vocabularies.
        """
        end = asyncio.get_running_loop().time() + timeout_seconds
        service = verify_pb2.DESCRIPTOR.services_by_name["VerifyService"].full_name
        await _wait_until_serving(self._verify_channel, service, self._verify_address, end)
        try:
            answer = await self.verify.GetVerifyInfo(
                verify_pb2.GetVerifyInfoRequest(), timeout=_INFO_TIMEOUT_SECONDS
            )
        except grpc.aio.AioRpcError as error:
            raise faults.error_of(error, f"verify service at {self._verify_address}") from error
        self.verify_model = codec.model_from_proto(answer.model)
        self.limits = codec.limits_from_proto(answer.limits)
        if self._draft_channel is None:
            return
        service = draft_pb2.DESCRIPTOR.services_by_name["DraftService"].full_name
        try:
            await _wait_until_serving(self._draft_channel, service, self._draft_address, end)
            await self._meet_draft()
        except (UnavailableError, grpc.aio.AioRpcError) as error:
            log.warning("going on without a draft for now: %s", error)

    async def close(self) -> None:
        """Close the channels."""
        await self._verify_channel.close(None)
        if self._draft_channel is not None:
            await self._draft_channel.close(None)

    async def _meet_draft(self) -> None:
        assert self.draft is not None
        answer = await self.draft.GetDraftInfo(
            draft_pb2.GetDraftInfoRequest(), timeout=_INFO_TIMEOUT_SECONDS
        )
        model = codec.model_from_proto(answer.model)
        check_pair(model, self.verify_model)
        self.draft_model = model
        self.limits = ServiceLimits(
            max_sessions=min(self.limits.max_sessions, answer.limits.max_sessions),
            max_context=self.limits.max_context,
            max_lookahead=min(self.limits.max_lookahead, answer.limits.max_lookahead),
            max_waiting=self.limits.max_waiting,
        )


async def _wait_until_serving(
    channel: grpc.aio.Channel, service: str, address: str, end: float
) -> None:
    """Return when health says that ``service`` serves; ``end`` in the event loop's time."""
    health = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    reason = "it does not answer"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(end):
            while True:
                watch = health.Watch(request, wait_for_ready=True)
                try:
                    async for answer in watch:
                        if answer.status == health_pb2.HealthCheckResponse.SERVING:
                            return
                        reason = "it answers but is not ready"
                except grpc.aio.AioRpcError as error:
                    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                        reason = "it has no health service; is this its port?"
                    await asyncio.sleep(0.1)  # the watch broke off: do not spin
                finally:
                    watch.cancel()
    kind = service.rpartition(".")[2]
    raise UnavailableError(
        f"{kind} at {address} cannot be used: {reason}; start it, or give its address"
    )
