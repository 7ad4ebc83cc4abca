"""An engine that hangs or fails: health, sessions, calls, recovery and the end of the service."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from amusd.engine.interface import ScheduledSequence
from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from amusd.fleet.model_description import ServiceLimits
from amusd.observe.engine_state import EngineCollector, EngineState
from amusd.observe.metrics import Metrics
from amusd.observe.observer import Observer
from amusd.rpc.server import LIVE, Listen, ServiceShell
from amusd.serving.engine_health import EngineHealth, HealthSettings
from amusd.serving.engine_thread import EngineThread
from amusd.serving.hosting import run_engine_service
from amusd.v1 import verify_pb2, verify_pb2_grpc
from verify_service.verify_servicer import VerifyServicer
from verify_service.verifying import VerifyWorker

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE = "amusd.v1.VerifyService"
MODEL = SyntheticModel(vocabulary=500, batch=4)
LIMITS = ServiceLimits(max_sessions=8, max_context=1000, max_lookahead=4, max_waiting=2)
QUICK = HealthSettings(hang_floor_seconds=0.25, restart_after_seconds=0.25, max_failed_passes=1)
NEVER_RESTARTED = HealthSettings(hang_floor_seconds=0.25, restart_after_seconds=600)
TIMEOUT_SECONDS = 30.0


class TroubledEngine(SyntheticEngine):
    """Hangs in a pass, or fails in each pass, while the test says so."""

    def __init__(self) -> None:
        super().__init__(MODEL)
        self.may_run = threading.Event()
        self.may_run.set()
        self.is_sick = False
        self.is_running = threading.Event()

    def run(self, feeds: Sequence[ScheduledSequence]) -> list[list[int]]:
        self.is_running.set()
        assert self.may_run.wait(TIMEOUT_SECONDS)
        if self.is_sick:
            raise RuntimeError("CUDA error")
        return super().run(feeds)


class Service:
    """A verify service in this process."""

    def __init__(self, settings: HealthSettings, grace_seconds: float = 5.0) -> None:
        self.engine = TroubledEngine()
        self.health = EngineHealth(settings)
        self.thread: EngineThread[VerifyWorker] = EngineThread("engine", self._make_worker)
        self.shell = ServiceShell(Listen(grace_seconds=grace_seconds), SERVICE, "Verify")
        self.metrics = Metrics("verify")
        observer = Observer("verify", self.metrics)
        servicer = VerifyServicer(self.thread, TIMEOUT_SECONDS, observer)
        verify_pb2_grpc.add_VerifyServiceServicer_to_server(servicer, self.shell.server)
        self.ended = asyncio.ensure_future(
            run_engine_service(self.shell, self.thread, lambda _: "it", False, self.health)
        )

    def num_failures(self, status: str) -> float | None:
        name = "amusd_request_failures_total"
        return self.metrics.registry.get_sample_value(name, {"status": status})

    def _make_worker(self) -> VerifyWorker:
        return VerifyWorker(self.engine, LIMITS, 100, health=self.health)


class Client:
    """Sees a service as orchestrators and Kubernetes do."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._health = health_pb2_grpc.HealthStub(channel)
        self.stub = verify_pb2_grpc.VerifyServiceStub(channel)
        self.ready = self._statuses(SERVICE)
        self.live = self._statuses(LIVE)

    async def until(self, statuses: AsyncIterator[int], wanted: int) -> None:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            async for status in statuses:
                if status == wanted:
                    return

    async def status(self, name: str) -> int:
        request = health_pb2.HealthCheckRequest(service=name)
        return int((await self._health.Check(request, timeout=TIMEOUT_SECONDS)).status)

    async def first_token(self, name: str) -> int:
        """Open a session and return its first token."""
        call = self.open(name)
        answer = await anext(aiter(call))
        call.cancel()
        return int(answer.verdict.next_token_id)

    def open(self, name: str) -> grpc.aio.StreamStreamCall:  # type: ignore[type-arg]
        async def requests() -> AsyncIterator[verify_pb2.VerifyRequest]:
            opening = verify_pb2.VerifyOpen(session_id=name, token_ids=[1, 2], max_position=50)
            yield verify_pb2.VerifyRequest(open=opening)
            await asyncio.sleep(TIMEOUT_SECONDS)

        return self.stub.Verify(requests(), timeout=TIMEOUT_SECONDS)

    async def _statuses(self, name: str) -> AsyncIterator[int]:
        request = health_pb2.HealthCheckRequest(service=name)
        async for answer in self._health.Watch(request, timeout=TIMEOUT_SECONDS):
            yield int(answer.status)


Starter = Callable[..., contextlib.AbstractAsyncContextManager[tuple[Service, Client]]]


@pytest.fixture
def serving(capsys: pytest.CaptureFixture[str]) -> Starter:
    """Run a service until the block ends."""

    @contextlib.asynccontextmanager
    async def serve(
        settings: HealthSettings = QUICK, grace_seconds: float = 5.0
    ) -> AsyncIterator[tuple[Service, Client]]:
        service = Service(settings, grace_seconds)
        await asyncio.wrap_future(service.thread.ready)
        address = capsys.readouterr().out.split()[-1]
        async with grpc.aio.insecure_channel(address) as channel:
            client = Client(channel)
            await client.until(client.ready, SERVING)
            yield service, client
            service.engine.may_run.set()
            service.shell.end()
            await service.ended

    return serve


async def refusal(call: grpc.aio.Call) -> str:
    """Return the status and the message that a call ends with."""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        return f"{(await call.code()).name} {await call.details()}"


async def test_a_pass_that_hangs_takes_the_service_out_of_use(
    serving: Starter, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as (service, client):
        assert await client.first_token("before") == MODEL.next_token([1, 2])
        service.engine.may_run.clear()
        waiting = client.open("waiting")
        await client.until(client.ready, NOT_SERVING)
        assert await refusal(waiting) == (
            "UNAVAILABLE the engine of this replica hangs: a pass takes longer than 0.25 s; use "
            "another replica"
        )
        assert service.num_failures("UNAVAILABLE") == 1
        assert await client.status("") == NOT_SERVING
        late = await refusal(client.open("late"))
        info = await refusal(client.stub.GetVerifyInfo(verify_pb2.GetVerifyInfoRequest()))
        assert "UNAVAILABLE" in late
        assert "UNAVAILABLE" in info
        assert "engine of this replica hangs" in late
        assert "engine of this replica hangs" in info
        await client.until(client.live, NOT_SERVING)
        assert "may_run.wait" in caplog.text  # the stack shows where it hangs


async def test_a_pass_that_ends_after_all_puts_the_service_back_into_use(serving: Starter) -> None:
    async with serving() as (service, client):
        service.engine.may_run.clear()
        waiting = client.open("waiting")
        await client.until(client.live, NOT_SERVING)
        await waiting.code()
        service.engine.may_run.set()
        await client.until(client.ready, SERVING)
        await client.until(client.live, SERVING)
        assert await client.first_token("after") == MODEL.next_token([1, 2])
        info = await client.stub.GetVerifyInfo(verify_pb2.GetVerifyInfoRequest())
        assert info.num_sessions + info.num_waiting <= 1  # the hung session is closed


async def test_a_hung_service_is_live_before_it_has_hung_for_long(serving: Starter) -> None:
    async with serving(NEVER_RESTARTED) as (service, client):
        service.engine.may_run.clear()
        await refusal(client.open("waiting"))
        assert await client.status(SERVICE) == NOT_SERVING
        assert await client.status(LIVE) == SERVING


async def test_a_slow_engine_may_take_its_usual_time(serving: Starter) -> None:
    async with serving(HealthSettings(hang_floor_seconds=0.05, hang_factor=100)) as (
        service,
        client,
    ):
        service.health.pass_ended(0.02)  # as passes before it
        service.engine.may_run.clear()
        call = client.open("slow")
        await asyncio.sleep(0.4)
        assert await client.status(SERVICE) == SERVING
        service.engine.may_run.set()
        assert (await anext(aiter(call))).verdict.next_token_id == MODEL.next_token([1, 2])
        call.cancel()


async def test_time_in_which_the_process_did_not_run_does_not_count(serving: Starter) -> None:
    async with serving(HealthSettings(hang_floor_seconds=0.5)) as (service, client):
        service.engine.may_run.clear()
        call = client.open("waiting")
        assert await asyncio.to_thread(service.engine.is_running.wait, TIMEOUT_SECONDS)
        time.sleep(1.0)  # as if the process were stopped  # noqa: ASYNC251
        await asyncio.sleep(0.05)
        assert await client.status(SERVICE) == SERVING
        service.engine.may_run.set()
        await anext(aiter(call))
        call.cancel()


async def test_an_idle_engine_does_not_hang(serving: Starter) -> None:
    async with serving() as (_, client):
        await asyncio.sleep(0.6)
        assert await client.status(SERVICE) == SERVING


async def test_without_a_floor_a_pass_may_take_any_time(serving: Starter) -> None:
    async with serving(HealthSettings(hang_floor_seconds=0, hang_factor=1)) as (service, client):
        service.engine.may_run.clear()
        call = client.open("slow")
        await asyncio.sleep(1.2)
        assert await client.status(SERVICE) == SERVING
        service.engine.may_run.set()
        await anext(aiter(call))
        call.cancel()


async def test_an_engine_that_fails_takes_the_service_out_of_use_until_it_works_again(
    serving: Starter,
) -> None:
    async with serving() as (service, client):
        service.engine.is_sick = True
        failed = await refusal(client.open("failed"))
        assert failed == (
            "INTERNAL the engine failed while computing this session (RuntimeError): the log of "
            "the service says why"
        )
        await client.until(client.ready, NOT_SERVING)
        reason = "UNAVAILABLE the engine of this replica fails (RuntimeError: CUDA error)"
        assert (await refusal(client.open("late"))).startswith(reason)
        await client.until(client.live, NOT_SERVING)
        service.engine.is_sick = False
        await client.until(client.ready, SERVING)
        await client.until(client.live, SERVING)
        assert await client.first_token("after") == MODEL.next_token([1, 2])


async def test_metrics_tell_whether_the_engine_is_healthy(serving: Starter) -> None:
    async with serving() as (service, client):
        collector = EngineCollector(
            lambda: service.thread.submit(lambda _: EngineState()), service.health
        )

        def healthy() -> float:
            shown = {one.name: one.samples[0].value for one in collector.collect()}
            return float(shown["amusd_engine_healthy"])

        assert await asyncio.to_thread(healthy) == 1
        service.engine.may_run.clear()
        await refusal(client.open("waiting"))
        assert await asyncio.to_thread(healthy) == 0


@pytest.mark.parametrize("is_known", [True, False])
async def test_a_service_whose_engine_hangs_ends_within_its_grace(
    serving: Starter, is_known: bool
) -> None:
    floor = 0.2 if is_known else 60.0
    async with serving(HealthSettings(hang_floor_seconds=floor), grace_seconds=0.5) as (
        service,
        client,
    ):
        service.engine.may_run.clear()
        call = client.open("waiting")
        if is_known:
            await client.until(client.ready, NOT_SERVING)
        else:
            assert await asyncio.to_thread(service.engine.is_running.wait, TIMEOUT_SECONDS)
        service.shell.end()
        async with asyncio.timeout(2.5):  # the grace, and the least time for server and thread
            await service.ended
        assert "UNAVAILABLE" in await refusal(call)
