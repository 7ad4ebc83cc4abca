"""Pools and the sessions on them, with services in this process and names that a test resolves."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace

import grpc
import pytest

from amusd.fleet.load_balancing import ReplicaState
from amusd.fleet.vocabulary import Vocabulary
from amusd.protocol.errors import (
    AmusdError,
    InvalidInputError,
    LimitExceededError,
    UnavailableError,
)
from amusd.protocol.strategy import Strategy
from orchestrator.backends import Backends
from tests.orchestrator.replicas import (
    MODEL,
    FakeDraft,
    FakeVerify,
    Host,
    becomes_true,
    written,
)
from tests.orchestrator.running_backends import Serve, generate, running


class Names:
    """Resolves the names that a test gives it."""

    def __init__(self, **addresses: tuple[str, ...]) -> None:
        self.addresses = addresses

    async def __call__(self, host: str) -> tuple[str, ...]:
        if host not in self.addresses:
            raise OSError("no such name")
        return self.addresses[host]


def used(backends: Backends) -> list[str]:
    return [replica.address for replica in backends.verify.usable]


async def check_refused(
    serve: Serve, services: Sequence[FakeVerify], error: type[AmusdError], match: str | None = None
) -> None:
    """Check that a session on a pool of ``services`` alone ends with ``error``."""
    addresses = [await serve(service) for service in services]
    async with running(",".join(addresses)) as backends:
        await becomes_true(lambda: len(used(backends)) == len(services))
        with pytest.raises(error, match=match):
            await generate(backends, Strategy.AUTOREGRESSIVE)


async def test_a_name_is_a_pool_whose_replicas_come_and_go(serve: Serve) -> None:
    port = int((await serve(FakeVerify())).rpartition(":")[2])
    for host in ("127.0.0.2", "127.0.0.3"):
        await serve(FakeVerify(), host, port)
    names = Names(pool=("127.0.0.1", "127.0.0.2"))
    async with running(f"pool:{port}", names=names) as backends:
        await backends.connect(10)
        await becomes_true(lambda: used(backends) == [f"127.0.0.1:{port}", f"127.0.0.2:{port}"])
        assert backends.limits.max_sessions == 16
        leaving = backends.verify.take(avoid=[f"127.0.0.2:{port}"])
        names.addresses["pool"] = ("127.0.0.2", "127.0.0.3")
        await becomes_true(lambda: used(backends) == [f"127.0.0.2:{port}", f"127.0.0.3:{port}"])
        assert leaving.replica.state is ReplicaState.DRAINING
        assert backends.num_replicas()["verify", ReplicaState.DRAINING] == 1
        leaving.release()
        leaving.release()  # counts once
        await becomes_true(lambda: len(backends.verify.replicas) == 2)


async def test_a_name_that_no_longer_resolves_leaves_the_pool_as_it_was(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    port = int((await serve(FakeVerify())).rpartition(":")[2])
    names = Names(pool=("127.0.0.1",))
    async with running(f"pool:{port}", names=names) as backends:
        await backends.connect(10)
        del names.addresses["pool"]
        await becomes_true(lambda: "resolves to nothing" in caplog.text)
        await asyncio.sleep(0.1)  # several times more
        assert used(backends) == [f"127.0.0.1:{port}"]
    lines = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert len(lines) == 1


async def test_a_name_that_does_not_resolve_is_reported_with_advice() -> None:
    names = Names()
    async with running("pool:1", names=names) as backends:
        with pytest.raises(UnavailableError, match=r"'pool' resolves to nothing.*--verify"):
            await backends.connect(0.2)


async def test_a_replica_that_shuts_down_does_not_wait_for_a_health_watch(
    serve: Serve, hosts: list[Host]
) -> None:
    first, second = await serve(FakeVerify()), await serve(FakeVerify())
    async with running(f"{first},{second}") as backends:
        await becomes_true(lambda: used(backends) == sorted([first, second]))
        await hosts[0].set_serving(False)
        await becomes_true(lambda: used(backends) == [second])
        async with asyncio.timeout(5):
            await hosts[0].server.stop(60)


async def test_a_replica_that_serves_again_is_used_again(serve: Serve, hosts: list[Host]) -> None:
    address = await serve(FakeVerify())
    async with running(address) as backends:
        await backends.connect(10)
        await hosts[0].set_serving(False)
        await becomes_true(lambda: not used(backends))
        with pytest.raises(UnavailableError, match="not ready"):
            backends.verify.take()
        await hosts[0].set_serving(True)
        await becomes_true(lambda: used(backends) == [address])


async def test_a_service_of_another_role_is_reported_with_advice(serve: Serve) -> None:
    draft = await serve(FakeDraft())
    async with running(draft) as backends:
        with pytest.raises(UnavailableError, match=r"does not know amusd\.v1\.VerifyService.*port"):
            await backends.connect(0.5)


async def test_the_load_that_replicas_report_decides_which_one_is_taken(serve: Serve) -> None:
    busy, idle = await serve(FakeVerify(num_sessions=5)), await serve(FakeVerify())
    async with running(f"{busy},{idle}") as backends:
        await becomes_true(lambda: len(used(backends)) == 2)
        assert backends.verify.take().address == idle


async def test_a_verify_replica_with_another_model_is_refused(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    port = int((await serve(FakeVerify())).rpartition(":")[2])
    await serve(FakeVerify(replace(MODEL, dtype="bfloat16")), "127.0.0.2", port)
    names = Names(pool=("127.0.0.1",))
    async with running(f"pool:{port}", names=names) as backends:
        await backends.connect(10)
        names.addresses["pool"] = ("127.0.0.1", "127.0.0.2")
        await becomes_true(lambda: backends.num_replicas()["verify", ReplicaState.REFUSED] == 1)
        assert used(backends) == [f"127.0.0.1:{port}"]
    (line,) = (one.message for one in caplog.records if "refusing" in one.message)
    assert f"127.0.0.2:{port}: its dtype is bfloat16, the pool's none" in line
    assert "restart the orchestrators" in line


async def test_an_orchestrator_whose_whole_pool_has_another_model_is_outdated(
    serve: Serve,
) -> None:
    port = int((await serve(FakeVerify())).rpartition(":")[2])
    await serve(FakeVerify(replace(MODEL, name="other")), "127.0.0.2", port)
    names = Names(pool=("127.0.0.1",))
    async with running(f"pool:{port}", names=names) as backends:
        await backends.connect(10)
        lease = backends.verify.take()
        names.addresses["pool"] = ("127.0.0.2",)
        await becomes_true(lambda: backends.num_replicas()["verify", ReplicaState.REFUSED] == 1)
        outdated = asyncio.create_task(backends.until_outdated())
        await asyncio.sleep(0.1)
        assert not outdated.done()  # a session still runs
        lease.release()
        with pytest.raises(UnavailableError, match=r"another model.*'other'.*restart"):
            await outdated


async def test_draft_replicas_of_another_vocabulary_prevent_the_start(serve: Serve) -> None:
    verify = await serve(FakeVerify())
    draft = await serve(FakeDraft(replace(MODEL, vocabulary=Vocabulary.of(["a"]))))
    async with running(verify, draft) as backends:
        with pytest.raises(InvalidInputError, match="share their tokenizer"):
            await backends.connect(10)


async def test_one_draft_replica_of_the_right_vocabulary_is_enough(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    verify, good = await serve(FakeVerify()), await serve(FakeDraft())
    bad = await serve(FakeDraft(replace(MODEL, vocabulary=Vocabulary.of(["a"]))))
    async with running(verify, f"{good},{bad}") as backends:
        await backends.draft.until(
            lambda: (
                {one.state for one in backends.draft.replicas}
                == {ReplicaState.HEALTHY, ReplicaState.REFUSED}
            )
        )
        await backends.connect(10)
        assert {backends.draft.take().address for _ in range(5)} == {good}
    assert f"refusing draft replica {bad}" in caplog.text


async def test_a_session_that_a_replica_refuses_is_opened_on_another(serve: Serve) -> None:
    ending = FakeVerify(refusal=grpc.StatusCode.UNAVAILABLE)
    going_on = FakeVerify(num_sessions=9)
    addresses = await serve(ending), await serve(going_on)
    async with running(",".join(addresses)) as backends:
        await becomes_true(lambda: len(used(backends)) == 2)
        await generate(backends, Strategy.AUTOREGRESSIVE)
        assert [len(one.opened) for one in (ending, going_on)] == [1, 1]
        assert [one.load.num_own for one in backends.verify.replicas] == [0, 0]


async def test_the_tail_is_sent_again_to_the_other_replica(serve: Serve) -> None:
    ending = FakeVerify(refusal=grpc.StatusCode.UNAVAILABLE, num_computed=2)
    going_on = FakeVerify(num_sessions=9)
    addresses = await serve(ending), await serve(going_on)
    draft = await serve(FakeDraft(num_proposed=3))
    async with running(",".join(addresses), draft) as backends:
        await becomes_true(lambda: len(used(backends)) == 2)
        await backends.connect(10)
        outcome = await generate(backends, Strategy.AMUSD)
    assert list(ending.proposals[0].token_ids) == written([1, 2], 3)
    assert list(going_on.proposals[0].token_ids) == written([1, 2], 3)
    assert going_on.proposals[0].position == 2
    assert outcome.statistics.num_accepted == 3
    assert not outcome.statistics.fallback_reason


async def test_a_session_that_every_replica_refuses_ends_with_advice(serve: Serve) -> None:
    services = [FakeVerify(refusal=grpc.StatusCode.UNAVAILABLE) for _ in range(3)]
    await check_refused(serve, services, UnavailableError, r"just refused the session.*try again")
    assert [len(service.opened) for service in services] == [1, 1, 1]


async def test_the_number_of_tries_is_bounded(serve: Serve) -> None:
    services = [FakeVerify(refusal=grpc.StatusCode.UNAVAILABLE) for _ in range(7)]
    await check_refused(serve, services, UnavailableError, "shutting down")
    assert sum(len(service.opened) for service in services) == 4


async def test_an_invalid_session_is_not_tried_on_another_replica(serve: Serve) -> None:
    services = [FakeVerify(refusal=grpc.StatusCode.INVALID_ARGUMENT) for _ in range(2)]
    await check_refused(serve, services, InvalidInputError)
    assert sum(len(service.opened) for service in services) == 1


async def test_a_refusal_whose_status_was_lost_is_asked_for_again(serve: Serve) -> None:
    service = FakeVerify(refusal=grpc.StatusCode.RESOURCE_EXHAUSTED, num_lost=2)
    await check_refused(serve, [service], LimitExceededError, "shutting down")
    assert len(service.opened) == 3


async def test_a_status_that_is_always_lost_is_asked_for_four_times(serve: Serve) -> None:
    service = FakeVerify(refusal=grpc.StatusCode.RESOURCE_EXHAUSTED, num_lost=99)
    await check_refused(serve, [service], UnavailableError, "its log says why")
    assert len(service.opened) == 4


async def test_a_draft_replica_that_refuses_is_replaced_by_another(serve: Serve) -> None:
    verify = await serve(FakeVerify())
    ending, going_on = FakeDraft(refusal=grpc.StatusCode.UNAVAILABLE), FakeDraft(num_sessions=9)
    addresses = await serve(ending), await serve(going_on)
    async with running(verify, ",".join(addresses)) as backends:
        await backends.draft.until(lambda: len(backends.draft.usable) == 2)
        await backends.connect(10)
        outcome = await generate(backends, Strategy.AMUSD)
    # gRPC may lose the status of a refusal; then the same replica is tried again.
    assert 1 <= len(ending.opened) <= 2
    assert len(going_on.opened) == 1
    assert not outcome.statistics.fallback_reason


async def test_a_session_goes_on_without_any_draft(serve: Serve) -> None:
    verify = await serve(FakeVerify())
    draft = FakeDraft(refusal=grpc.StatusCode.UNAVAILABLE)
    address = await serve(draft)
    async with running(verify, address) as backends:
        await backends.connect(10)
        outcome = await generate(backends, Strategy.AMUSD)
    assert "draft service" in outcome.statistics.fallback_reason
    assert len(draft.opened) == 1
