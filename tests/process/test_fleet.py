"""Pools of real processes: replicas that drain, join, die or serve something else."""

import asyncio
import contextlib
import itertools
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import pytest

from amusd.client import Client, Options
from amusd.prompts import Prompt
from amusd.protocol.errors import UnavailableError
from amusd.protocol.strategy import Strategy
from amusd.v1 import orchestrator_pb2 as pb
from amusd.v1 import orchestrator_pb2_grpc as rpc
from tests.process.scrape import free_port, scrape
from tests.process.services import DRAFT_MODEL, VERIFY_MODEL, Service, Starter, amusd, becomes_true
from tests.process.synthetic_models import expected_output

pytestmark = pytest.mark.process

BOUND_SECONDS = 20.0
HEALTHY = pb.REPLICA_STATE_HEALTHY

Stubs = dict[int, "rpc.OrchestratorServiceAsyncStub"]

# Slow passes that many share: generations last, but cost little of the test machine.
SLOW_VERIFY = "synthetic:pass_ms=300,vocabulary=512,context=600,batch=128"
SLOW_DRAFT = "synthetic:agreement=0.7,pass_ms=60,vocabulary=512,context=600,batch=128"


def port_of(service: Service) -> str:
    return service.address.rpartition(":")[2]


def orchestrate(start: Starter, verify: str, draft: str, *flags: str) -> Service:
    return start(
        "orchestrator", "--verify", verify, "--draft", draft, "--resolve-interval", "0.2",
        "--draft-timeout", "3", "--verify-timeout", "20", *flags,
    )  # fmt: skip


def states(client: Client) -> dict[str, pb.ReplicaState.ValueType]:
    """Return the state of each replica as the orchestrator reports it, by address."""
    info = client.server_info()
    return {one.address: one.state for one in (*info.verify_replicas, *info.draft_replicas)}


def generates(client: Client, strategy: Strategy = Strategy.AMUSD) -> bool:
    """Generate 20 tokens; return whether the draft was kept."""
    generation = client.generate(Prompt(tokens=(3,)), Options(strategy, 20)).wait()
    assert generation.tokens == expected_output(VERIFY_MODEL, (3,), 20)
    return not generation.summary().fallback_reason


def test_a_replica_that_is_killed_leaves_its_work_to_the_others(start: Starter) -> None:
    verifies = [start("verify", "--model", VERIFY_MODEL) for _ in range(2)]
    drafts = [start("draft", "--model", DRAFT_MODEL) for _ in range(2)]
    services = (*verifies, *drafts)
    for service in services:
        service.wait_until_serving()
    orchestrator = orchestrate(
        start, ",".join(one.address for one in verifies), ",".join(one.address for one in drafts)
    )
    orchestrator.wait_until_serving()
    with Client(orchestrator.address, timeout_seconds=60) as client:
        assert becomes_true(lambda: set(states(client).values()) == {HEALTHY}, BOUND_SECONDS)
        for killed in (verifies[0], drafts[1]):
            kill_beside_generations(client, killed)
            # Before and after its state is known: a refused session is opened on another replica.
            assert all(generates(client) for _ in range(8))
            assert becomes_true(
                lambda address=killed.address: states(client)[address] == pb.REPLICA_STATE_AWAY,  # type: ignore[misc]
                BOUND_SECONDS,
            )
            assert all(generates(client) for _ in range(4))


def kill_beside_generations(client: Client, service: Service) -> None:
    """Kill a replica while as many generations run as both have places; none loses a token."""
    generations = [client.generate(Prompt(tokens=(one,)), Options(max_tokens=90)) for one in (1, 2)]
    begun = [iter(generation) for generation in generations]  # one that is dropped ends the call
    for pieces in begun:
        next(pieces)
    service.process.kill()
    for number, generation in enumerate(generations, start=1):
        generation.wait()
        assert generation.tokens == expected_output(VERIFY_MODEL, (number,), 90)


def test_without_verify_replicas_there_is_advice_until_one_comes_back(start: Starter) -> None:
    verifies = [start("verify", "--model", VERIFY_MODEL) for _ in range(2)]
    for service in verifies:
        service.wait_until_serving()
    orchestrator = orchestrate(start, ",".join(one.address for one in verifies), "")
    orchestrator.wait_until_serving()
    options = Options(Strategy.AUTOREGRESSIVE, 20)
    with Client(orchestrator.address, timeout_seconds=60) as client:
        for service in verifies:
            service.process.kill()
            service.process.wait()
        with pytest.raises(UnavailableError, match=r"verify service cannot be used.*start one"):
            client.generate(Prompt(tokens=(3,)), options).wait()
        assert client.server_info().limits.max_context == 600  # as far as is known
        start("verify", "--model", VERIFY_MODEL, "--port", port_of(verifies[1]))
        assert becomes_true(lambda: HEALTHY in states(client).values(), BOUND_SECONDS)
        assert generates(client, Strategy.AUTOREGRESSIVE)


def test_a_replica_with_another_model_is_refused_with_a_line_in_the_log(
    start: Starter, tmp_path: Path
) -> None:
    good = start("verify", "--model", VERIFY_MODEL), start("draft", "--model", DRAFT_MODEL)
    listed = tmp_path / "verify", tmp_path / "draft"
    for path, service in zip(listed, good, strict=True):
        path.write_text(service.address)
    orchestrator = orchestrate(start, f"file://{listed[0]}", f"file://{listed[1]}")
    orchestrator.wait_until_serving()
    bad = (
        start("verify", "--model", "synthetic:vocabulary=512,context=600,seed=1"),
        start("draft", "--model", "synthetic:vocabulary=700"),
    )
    for path, service in zip(listed, bad, strict=True):
        with path.open("a") as opened:
            opened.write(f"\n{service.address}  # other\n")
    with Client(orchestrator.address, timeout_seconds=60) as client:
        for service in bad:
            assert becomes_true(
                lambda address=service.address: (  # type: ignore[misc]
                    states(client).get(address) == pb.REPLICA_STATE_REFUSED
                ),
                BOUND_SECONDS,
            )
        assert all(generates(client) for _ in range(8))
        info = client.server_info()
    refused = [one for one in (*info.verify_replicas, *info.draft_replicas) if one.reason]
    assert [one.num_opened_sessions for one in refused] == [0, 0]
    log = [line for line in orchestrator.log.read_text().splitlines() if "refusing" in line]
    verify, draft = sorted(log, key=lambda line: "draft replica" in line)
    assert "its weights differ" in verify
    assert "restart the orchestrators" in verify
    assert "700 tokens" in draft
    assert "share their tokenizer" in draft


def test_a_name_that_resolves_to_nothing_ends_the_start_with_one_line() -> None:
    done = amusd(
        "serve", "orchestrator", "--verify", "nothing.invalid:50052", "--draft", "",
        "--port", "0", "--startup-timeout", "1", "--resolve-interval", "0.2",
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "'nothing.invalid' resolves to nothing" in line
    assert "check its spelling" in line


@pytest.mark.parametrize("address", ["nowhere", "a:b", "file://here"])
def test_an_invalid_address_is_reported(address: str) -> None:
    done = amusd("serve", "orchestrator", "--verify", address, "--port", "0")
    assert done.returncode == 2
    assert address in done.stderr


@pytest.mark.slow
async def test_two_hundred_generations_go_on_while_replicas_come_and_go(
    start: Starter, tmp_path: Path
) -> None:
    """The orchestrators share nothing. A replica of each kind drains, and another one joins."""
    fleet = Fleet.launched(start, tmp_path)
    async with fleet.stubs() as stubs:
        await fleet.all_use(stubs, fleet.verifies[:2], fleet.drafts[:4])
        first = Wave(stubs, range(100), num_tokens=60)
        await first.begun()
        await fleet.check_balance(stubs, fleet.verifies[:2])
        await fleet.check_balance(stubs, fleet.drafts[:4])
        for leaving in (fleet.verifies[0], fleet.drafts[0]):
            leaving.process.terminate()
        fleet.publish(fleet.verifies, fleet.drafts[1:])
        await fleet.all_use(stubs, fleet.verifies[1:], fleet.drafts[1:])
        second = Wave(stubs, range(100, 200), num_tokens=24)
        await second.begun()
        assert first.num_open == second.num_open == 100
        await fleet.check_balance(stubs, fleet.verifies[1:])
        await fleet.check_balance(stubs, fleet.drafts[1:])
        fleet.orchestrators[0].process.terminate()
        fleet.orchestrate()
        async with fleet.stubs(first=1) as rest:
            await fleet.all_use(rest, fleet.verifies[1:], fleet.drafts[1:])
            third = Wave(rest, range(200, 212), num_tokens=12)
            waves = (first, second, third)
            await asyncio.gather(*(wave.done() for wave in waves))
    for port in rest:
        check_metrics(port, [one for wave in waves for one in wave.statistics[port]])
    for drained in (fleet.verifies[0], fleet.drafts[0], fleet.orchestrators[0]):
        assert drained.process.wait(20) == 0


@dataclass(frozen=True)
class Fleet:
    """Three verify and five draft replicas, some of them listed in files; three orchestrators.

    ``metrics_ports`` are those of the orchestrators.
    """

    start: Starter
    verifies: list[Service]
    drafts: list[Service]
    files: tuple[Path, Path]
    orchestrators: list[Service] = field(default_factory=list)
    metrics_ports: list[int] = field(default_factory=list)

    @classmethod
    def launched(cls, start: Starter, folder: Path) -> "Fleet":
        flags = ("--max-sessions", "256", "--grace", "60")
        fleet = cls(
            start,
            [start("verify", "--model", SLOW_VERIFY, *flags) for _ in range(3)],
            [start("draft", "--model", SLOW_DRAFT, *flags) for _ in range(5)],
            (folder / "verifies", folder / "drafts"),
        )
        fleet.publish(fleet.verifies[:2], fleet.drafts[:4])
        for _ in range(3):
            fleet.orchestrate()
        return fleet

    def orchestrate(self) -> None:
        """Start another orchestrator."""
        entries = [f"file://{path}" for path in self.files]
        port = free_port()
        flags = ("--max-sessions", "100", "--grace", "60", "--metrics-port", str(port))
        self.orchestrators.append(orchestrate(self.start, *entries, *flags))
        self.metrics_ports.append(port)

    def publish(self, *listed: Sequence[Service]) -> None:
        for path, services in zip(self.files, listed, strict=True):
            other = path.with_suffix(".new")
            other.write_text("\n".join(service.address for service in services))
            other.replace(path)  # never half written

    @contextlib.asynccontextmanager
    async def stubs(self, first: int = 0) -> "AsyncIterator[Stubs]":
        """Yield stubs of the orchestrators from ``first`` on, by their metrics' ports."""
        async with contextlib.AsyncExitStack() as stack:
            found: Stubs = {}
            for port, service in list(zip(self.metrics_ports, self.orchestrators, strict=True))[
                first:
            ]:
                channel = grpc.aio.insecure_channel(service.address)
                await stack.enter_async_context(channel)
                found[port] = rpc.OrchestratorServiceStub(channel)
            yield found

    async def all_use(self, stubs: "Stubs", *used: Sequence[Service]) -> None:
        """Wait until each orchestrator uses exactly these replicas."""
        wanted = {service.address for services in used for service in services}
        async with asyncio.timeout(BOUND_SECONDS):
            for stub in stubs.values():
                while await healthy(stub) != wanted:  # noqa: ASYNC110  # a process of its own
                    await asyncio.sleep(0.05)

    async def check_balance(self, stubs: "Stubs", services: Sequence[Service]) -> None:
        """Check that the orchestrators together have opened as many sessions on each."""
        opened: Counter[str] = Counter()
        for stub in stubs.values():
            info = await stub.GetServerInfo(pb.GetServerInfoRequest())
            for one in (*info.verify_replicas, *info.draft_replicas):
                opened[one.address] += one.num_opened_sessions
        numbers = [opened[service.address] for service in services]
        mean = sum(numbers) / len(numbers)
        assert mean > 0
        assert all(abs(number - mean) <= 0.2 * mean for number in numbers), opened


async def healthy(stub: "rpc.OrchestratorServiceAsyncStub") -> set[str]:
    try:
        info = await stub.GetServerInfo(pb.GetServerInfoRequest())
    except grpc.aio.AioRpcError:
        return set()
    replicas = (*info.verify_replicas, *info.draft_replicas)
    return {one.address for one in replicas if one.state == HEALTHY}


def check_metrics(port: int, seen: list[pb.Statistics]) -> None:
    """Check that an orchestrator's metrics are the sums of its clients' statistics."""
    metrics = scrape(port)
    assert metrics["amusd_request_seconds_count"] == len(seen) > 0
    assert metrics["amusd_request_failures_total"] == 0
    of_statistics = {
        "amusd_generation_tokens_total": "num_output_tokens",
        "amusd_spec_decode_num_draft_tokens_total": "num_drafted",
        "amusd_spec_decode_num_accepted_tokens_total": "num_accepted",
        "amusd_spec_decode_num_wasted_tokens_total": "num_wasted",
        "amusd_rollbacks_total": "num_rollbacks",
    }
    for name, number in of_statistics.items():
        assert metrics[name] == sum(getattr(one, number) for one in seen) > 0, name


class Wave:
    """Generations that begin at once, spread over the orchestrators.

    ``statistics`` are those of the ones that are done, by their orchestrator's metrics port.
    """

    def __init__(self, stubs: "Stubs", prompts: range, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self.statistics: defaultdict[int, list[pb.Statistics]] = defaultdict(list)
        self._begun = [asyncio.Event() for _ in prompts]
        self._tasks = [
            asyncio.create_task(self._generate(port, stub, prompt, begun))
            for (port, stub), prompt, begun in zip(
                itertools.cycle(stubs.items()), prompts, self._begun, strict=False
            )
        ]

    @property
    def num_open(self) -> int:
        return sum(not task.done() for task in self._tasks)

    async def begun(self) -> None:
        """Wait until each generation has its first tokens."""
        async with asyncio.timeout(BOUND_SECONDS):
            for begun in self._begun:
                await begun.wait()

    async def done(self) -> None:
        """Wait for all; their tokens are the verify model's own."""
        await asyncio.gather(*self._tasks)

    async def _generate(
        self,
        port: int,
        stub: "rpc.OrchestratorServiceAsyncStub",
        prompt: int,
        begun: asyncio.Event,
    ) -> None:
        request = pb.GenerateRequest(
            tokens=pb.TokenIds(ids=[prompt, 7]),
            max_tokens=self._num_tokens,
            strategy=pb.STRATEGY_AMUSD,
        )
        tokens: list[int] = []
        statistics = pb.Statistics()
        try:
            async for response in stub.Generate(request, timeout=100):
                tokens.extend(response.chunk.token_ids)
                statistics = response.completion.statistics
                begun.set()
        finally:
            begun.set()  # if it has failed, ``done`` raises the error
        assert tokens == expected_output(SLOW_VERIFY, (prompt, 7), self._num_tokens)
        assert not statistics.fallback_reason
        self.statistics[port].append(statistics)
