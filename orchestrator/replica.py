"""One replica of a pool: its channel, health, model and load.

The pool creates a replica, runs ``Replica.run`` as a task, and cancels it. The task watches the
health of the service's full name. It fetches the replica's model and load whenever the service
becomes healthy, and its load once a second. The pool decides which replica is used.

Health comes from the service's event loop. The load comes from its engine, so a load call without
an answer, or sessions without messages, show that the engine hangs.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from amusd.fleet.load_balancing import ReplicaLoad, ReplicaState, ReplicaStatus
from amusd.fleet.model_description import ModelDescription, ServiceLimits
from amusd.fleet.responsiveness import Responsiveness
from amusd.rpc import model_codec
from amusd.rpc.channel import open_channel
from amusd.v1 import draft_pb2, model_pb2, verify_pb2, verify_pb2_grpc
from orchestrator.rollback_stream import DraftStub

log = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_RETRY_SECONDS = 0.5

NOT_LISTED = "it is no longer listed"

Stub = TypeVar("Stub")
Validate = Callable[[ModelDescription], str | None]


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """A replica's reply to an info call; ``num_sessions`` counts open and waiting sessions."""

    model: ModelDescription
    limits: ServiceLimits
    num_sessions: int

    @classmethod
    def from_proto(
        cls, model: model_pb2.ModelInfo, limits: model_pb2.ServiceLimits, num_sessions: int
    ) -> "ReplicaInfo":
        """Return the info from the parts of a reply."""
        return cls(
            model_codec.model_from_proto(model), model_codec.limits_from_proto(limits), num_sessions
        )


@dataclass(frozen=True, slots=True)
class ServiceKind(Generic[Stub]):
    """The service of a pool's replicas: its role, its full gRPC name, and how to call it."""

    role: str
    service: str
    make_stub: Callable[[grpc.aio.Channel], Stub]
    fetch_info: Callable[[Stub, float], Awaitable[ReplicaInfo]]


def _verify_stub(channel: grpc.aio.Channel) -> "verify_pb2_grpc.VerifyServiceAsyncStub":
    return verify_pb2_grpc.VerifyServiceStub(channel)


async def _fetch_verify_info(
    stub: "verify_pb2_grpc.VerifyServiceAsyncStub", timeout_seconds: float
) -> ReplicaInfo:
    request = verify_pb2.GetVerifyInfoRequest()
    info = await stub.GetVerifyInfo(request, timeout=timeout_seconds)
    return ReplicaInfo.from_proto(info.model, info.limits, info.num_sessions + info.num_waiting)


async def _fetch_draft_info(stub: DraftStub, timeout_seconds: float) -> ReplicaInfo:
    info = await stub.info(timeout_seconds)
    return ReplicaInfo.from_proto(info.model, info.limits, info.num_sessions + info.num_waiting)


VERIFY: "ServiceKind[verify_pb2_grpc.VerifyServiceAsyncStub]" = ServiceKind(
    "verify",
    verify_pb2.DESCRIPTOR.services_by_name["VerifyService"].full_name,
    _verify_stub,
    _fetch_verify_info,
)
DRAFT: ServiceKind[DraftStub] = ServiceKind(
    "draft",
    draft_pb2.DESCRIPTOR.services_by_name["DraftService"].full_name,
    DraftStub,
    _fetch_draft_info,
)


class Replica(Generic[Stub]):
    """One service process. ``reason`` says why it is not used, and is empty if it is used."""

    def __init__(
        self,
        kind: ServiceKind[Stub],
        address: str,
        validate: Validate,
        on_change: Callable[[], None],
        timeout_seconds: float,
        use_proxy: bool = False,
    ) -> None:
        """Create a channel to ``address``, ``host:port``; with ``use_proxy`` through a proxy.

        ``validate`` returns the reason to refuse a model, or None to accept it. ``on_change`` is
        called after each change of ``state``. The replica has to answer calls within
        ``timeout_seconds``.
        """
        self.address = address
        self.load = ReplicaLoad()
        self.answers = Responsiveness(timeout_seconds)
        self.is_listed = True
        self.reason = "it does not answer"
        self.info: ReplicaInfo | None = None
        self._kind = kind
        self._validate = validate
        self._on_change = on_change
        self._channel = open_channel(address, use_proxy)
        self.stub = kind.make_stub(self._channel)
        self._is_serving = False
        self._is_refused = False
        self._silence = ""  # that was logged, and has not ended

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection to the replica."""
        return self._channel.get_state() is grpc.ChannelConnectivity.READY

    @property
    def state(self) -> ReplicaState:
        """The current state."""
        if self._is_refused:
            return ReplicaState.REFUSED
        if self._is_serving and not self.answers.is_usable(time.monotonic()):
            return ReplicaState.AWAY
        if self._is_serving and self.is_listed:
            return ReplicaState.HEALTHY
        if self.load.num_own:
            return ReplicaState.DRAINING
        return ReplicaState.AWAY

    @property
    def status(self) -> ReplicaStatus:
        """The replica as ``GetServerInfo`` shows it."""
        load = self.load
        reason = self.reason or self.answers.problem(time.monotonic())
        reason = reason or ("" if self.is_listed else NOT_LISTED)
        return ReplicaStatus(
            self.address, self.state, load.num_sessions, load.num_own, load.num_opened, reason
        )

    async def run(self) -> None:
        """Watch health and poll load until cancelled, then close the channel."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._keep_watching())
                group.create_task(self._keep_polling())
        finally:
            await self._channel.close(None)

    async def _keep_watching(self) -> None:
        while True:
            try:
                await self._watch()
            except grpc.aio.AioRpcError as error:
                self._stop_using(_reason(error))
                self.load.lost()
            except Exception:  # of whatever kind: it concerns this replica, and no other
                log.exception("the replica %s cannot be used", self.address)
                self._stop_using("its answer cannot be read; this orchestrator's log says why")
            # The watch has ended. Wait, so that a replica that refuses it is not called in a loop.
            await asyncio.sleep(_RETRY_SECONDS * random.uniform(0.5, 1.5))

    async def _watch(self) -> None:
        """Follow the replica's health until the watch ends or the replica shuts down."""
        request = health_pb2.HealthCheckRequest(service=self._kind.service)
        watch = health_pb2_grpc.HealthStub(self._channel).Watch(request, wait_for_ready=True)
        try:
            async for reply in watch:
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    await self._handshake()
                    continue
                was_known = self.info is not None
                is_known = reply.status != health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
                self._stop_using(
                    "it answers but is not ready"
                    if is_known
                    else f"it does not know {self._kind.service}; is this its port?"
                )
                if was_known:
                    return  # so that a server that shuts down need not wait for this watch
        finally:
            watch.cancel()

    async def _handshake(self) -> None:
        """Fetch the replica's model, and use the replica if its pool accepts the model."""
        await self._poll()
        assert self.info is not None
        mismatch = self._validate(self.info.model)
        self._is_refused = mismatch is not None
        self._is_serving = not self._is_refused
        self.reason = mismatch or ""
        self.answers.reset()
        if mismatch is None:
            model = self.info.model.summary()
            log.info("using %s replica %s: %s", self._kind.role, self.address, model)
        else:
            log.error("refusing %s replica %s: %s", self._kind.role, self.address, mismatch)
        self._on_change()

    async def _keep_polling(self) -> None:
        while True:
            await asyncio.sleep(_POLL_SECONDS * random.uniform(0.8, 1.2))
            if not self._is_serving:
                continue
            try:
                await self._poll()
            except grpc.aio.AioRpcError as error:
                # Its last known load still counts.
                log.debug("%s does not report its load: %s", self.address, _reason(error))
            except Exception:  # as in ``_keep_watching``
                log.exception("the load of %s cannot be read", self.address)
            self._log_silence()

    async def _poll(self) -> None:
        num_own = self.load.num_own
        self.answers.asked(time.monotonic())
        self.info = await self._kind.fetch_info(self.stub, self.answers.timeout_seconds)
        self.answers.replied(time.monotonic())
        self.load.reported(self.info.num_sessions, num_own)

    def _log_silence(self) -> None:
        """Log once when the replica stops answering, and once when it answers again."""
        problem = self.answers.problem(time.monotonic()) if self._is_serving else ""
        if bool(problem) == bool(self._silence):
            return
        self._silence = problem
        name = f"{self._kind.role} replica {self.address}"
        if problem:
            log.warning("no longer using %s: %s", name, problem)
        else:
            log.info("using %s again: it answers", name)
        self._on_change()

    def _stop_using(self, reason: str) -> None:
        if self._is_serving:
            log.warning("no longer using %s replica %s: %s", self._kind.role, self.address, reason)
        self._is_serving = self._is_refused = False
        self.reason = reason
        self._on_change()


def _reason(error: grpc.aio.AioRpcError) -> str:
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return "it has no health service; is this its port?"
    return f"it does not answer ({' '.join(str(error.details() or error.code().name).split())})"
