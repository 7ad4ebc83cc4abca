"""One replica of a pool: its channel, its health and its load, watched until it leaves.

A replica is made by its pool, which runs ``run`` as a task and ends it. That watches the health
of the full service name, asks for model and sessions whenever the service begins to serve, and
for the number of sessions now and then. Nothing here decides who is used.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from amusd.fleet.load_balancing import ReplicaLoad, ReplicaState, ReplicaStatus
from amusd.fleet.model_description import ModelDescription, ServiceLimits
from amusd.rpc import codec
from amusd.rpc.channel import open_channel
from amusd.v1 import draft_pb2, model_pb2, verify_pb2, verify_pb2_grpc
from orchestrator.rollback_stream import DraftStub

log = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_RETRY_SECONDS = 0.5
_ANSWER_SECONDS = 10.0

NOT_LISTED = "it is no longer listed"

Stub = TypeVar("Stub")
Validate = Callable[[ModelDescription], str | None]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a replica says about itself; ``num_sessions`` are open or wait."""

    model: ModelDescription
    limits: ServiceLimits
    num_sessions: int

    @classmethod
    def of(cls, model: model_pb2.ModelInfo, limits: model_pb2.ServiceLimits, num: int) -> "Answer":
        """Read the parts of a message."""
        return cls(codec.model_from_proto(model), codec.limits_from_proto(limits), num)


@dataclass(frozen=True, slots=True)
class Kind(Generic[Stub]):
    """What the replicas of a pool are: how to call them, and their service's full name."""

    role: str
    service: str
    make_stub: Callable[[grpc.aio.Channel], Stub]
    ask: Callable[[Stub], Awaitable[Answer]]


def _verify_stub(channel: grpc.aio.Channel) -> "verify_pb2_grpc.VerifyServiceAsyncStub":
    return verify_pb2_grpc.VerifyServiceStub(channel)


async def _ask_verify(stub: "verify_pb2_grpc.VerifyServiceAsyncStub") -> Answer:
    request = verify_pb2.GetVerifyInfoRequest()
    got = await stub.GetVerifyInfo(request, timeout=_ANSWER_SECONDS)
    return Answer.of(got.model, got.limits, got.num_sessions + got.num_waiting)


async def _ask_draft(stub: DraftStub) -> Answer:
    got = await stub.info(_ANSWER_SECONDS)
    return Answer.of(got.model, got.limits, got.num_sessions + got.num_waiting)


VERIFY: "Kind[verify_pb2_grpc.VerifyServiceAsyncStub]" = Kind(
    "verify",
    verify_pb2.DESCRIPTOR.services_by_name["VerifyService"].full_name,
    _verify_stub,
    _ask_verify,
)
DRAFT: Kind[DraftStub] = Kind(
    "draft",
    draft_pb2.DESCRIPTOR.services_by_name["DraftService"].full_name,
    DraftStub,
    _ask_draft,
)


class Replica(Generic[Stub]):
    """One service process. ``reason`` says in words why it is not used; empty if it is."""

    def __init__(
        self, kind: Kind[Stub], address: str, validate: Validate, on_change: Callable[[], None]
    ) -> None:
        """Prepare a channel to ``address``.

        ``validate`` says why a model may not be used, if so; ``on_change`` hears of each new state.
        """
        self.address = address
        self.load = ReplicaLoad()
        self.is_listed = True
        self.reason = "it does not answer"
        self.answer: Answer | None = None
        self._kind = kind
        self._validate = validate
        self._on_change = on_change
        self._channel = open_channel(address)
        self.stub = kind.make_stub(self._channel)
        self._is_serving = False
        self._is_refused = False

    @property
    def state(self) -> ReplicaState:
        """What the replica is good for now."""
        if self._is_refused:
            return ReplicaState.REFUSED
        if self._is_serving and self.is_listed:
            return ReplicaState.HEALTHY
        if self.load.num_own:
            return ReplicaState.DRAINING
        return ReplicaState.AWAY

    @property
    def status(self) -> ReplicaStatus:
        """The replica for people."""
        load, reason = self.load, self.reason or ("" if self.is_listed else NOT_LISTED)
        return ReplicaStatus(
            self.address, self.state, load.num_sessions, load.num_own, load.num_opened, reason
        )

    async def run(self) -> None:
        """Watch and poll until cancelled, then close the channel."""
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
            # The watch broke off: do not spin.
            await asyncio.sleep(_RETRY_SECONDS * random.uniform(0.5, 1.5))

    async def _watch(self) -> None:
        """Follow the replica's health until the watch breaks off, or the replica ends."""
        request = health_pb2.HealthCheckRequest(service=self._kind.service)
        watch = health_pb2_grpc.HealthStub(self._channel).Watch(request, wait_for_ready=True)
        try:
            async for answer in watch:
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    await self._handshake()
                    continue
                was_known = self.answer is not None
                is_known = answer.status != health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
                self._stop_using(
                    "it answers but is not ready"
                    if is_known
                    else f"it does not know {self._kind.service}; is this its port?"
                )
                if was_known:
                    return  # a server that ends need not wait for our watch to end, too
        finally:
            watch.cancel()

    async def _handshake(self) -> None:
        """Use the replica, if it serves what its pool serves."""
        await self._poll()
        assert self.answer is not None
        mismatch = self._validate(self.answer.model)
        self._is_refused = mismatch is not None
        self._is_serving = not self._is_refused
        self.reason = mismatch or ""
        if mismatch is None:
            model = self.answer.model.summary()
            log.info("using %s replica %s: %s", self._kind.role, self.address, model)
        else:
            log.error("refusing %s replica %s: %s", self._kind.role, self.address, mismatch)
        self._on_change()

    async def _keep_polling(self) -> None:
        while True:
            await asyncio.sleep(_POLL_SECONDS * random.uniform(0.8, 1.2))
            if self._is_serving:
                try:
                    await self._poll()
                except grpc.aio.AioRpcError as error:
                    # Its health decides whether it is used; the last known load counts till then.
                    log.debug("%s does not tell its load: %s", self.address, _reason(error))

    async def _poll(self) -> None:
        num_own = self.load.num_own
        self.answer = await self._kind.ask(self.stub)
        self.load.reported(self.answer.num_sessions, num_own)

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
