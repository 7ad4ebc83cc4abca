"""Replicas that fail or hang under a session: what the session does, and what later ones do."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

import grpc
import pytest

from amusd.fleet.load_balancing import ReplicaState, explain_mismatch
from amusd.fleet.model_description import ModelDescription
from amusd.protocol.errors import AmusdError, InternalError, UnavailableError
from amusd.protocol.events import Verdict
from amusd.protocol.strategy import Strategy
from amusd.rpc import codec
from amusd.rpc.channel import open_channel
from amusd.rpc.faults import Context
from amusd.v1 import draft_pb2, verify_pb2
from orchestrator.backends import DraftPool, VerifyPool
from orchestrator.rollback_stream import DraftStub
from tests.orchestrator.replicas import MODEL, FakeDraft, FakeVerify, Host, becomes_true
from tests.orchestrator.running_backends import Serve, generate, running

ABOUT_THE_REQUEST = [
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.PERMISSION_DENIED,
]
FOR_GOOD = [
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
]
DRAFTING = [Strategy.SPECULATIVE, Strategy.AMUSD]


@pytest.fixture(autouse=True)
def _short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.replica._POLL_SECONDS", 0.05)
    monkeypatch.setattr("amusd.fleet.responsiveness._LATE_SECONDS", 0.3)
    monkeypatch.setattr("amusd.fleet.responsiveness._MIN_PAUSE_SECONDS", 0.5)


async def pool_of(serve: Serve, *services: FakeVerify | FakeDraft) -> str:
    """Serve all of them; return their addresses as a setting has them."""
    return ",".join([await serve(service) for service in services])


async def all_used(pool: VerifyPool | DraftPool) -> None:
    await becomes_true(lambda: len(pool.usable) == len(pool.replicas) > 0)


async def check_failure(
    serve: Serve, status: grpc.StatusCode, num_replicas: int, num_tried: int
) -> AmusdError:
    """Generate on replicas of which each fails in its first pass; return the error."""
    services = [FakeVerify(num_free_passes=0, failure=status) for _ in range(num_replicas)]
    async with running(await pool_of(serve, *services)) as backends:
        await all_used(backends.verify)
        with pytest.raises(
            AmusdError, match=r"verify service: the pass failed: out of memory"
        ) as e:
            await generate(backends, Strategy.AUTOREGRESSIVE)
    assert sum(len(service.opened) for service in services) == num_tried
    return e.value


# A failed pass


@pytest.mark.parametrize("status", ABOUT_THE_REQUEST)
async def test_a_pass_that_fails_is_tried_on_one_other_replica_only(
    serve: Serve, status: grpc.StatusCode
) -> None:
    error = await check_failure(serve, status, num_replicas=4, num_tried=2)
    assert type(error) is InternalError


async def test_a_pass_that_fails_on_the_only_replica_is_reported_as_such(serve: Serve) -> None:
    error = await check_failure(serve, grpc.StatusCode.INTERNAL, num_replicas=1, num_tried=1)
    assert type(error) is InternalError


@pytest.mark.parametrize("status", FOR_GOOD)
async def test_a_request_that_is_wrong_is_tried_once(serve: Serve, status: grpc.StatusCode) -> None:
    error = await check_failure(serve, status, num_replicas=2, num_tried=1)
    assert not isinstance(error, UnavailableError)


@pytest.mark.parametrize("strategy", Strategy)
@pytest.mark.parametrize("num_passes", [0, 1, 4])
async def test_a_pass_that_succeeds_elsewhere_costs_no_token(
    serve: Serve, strategy: Strategy, num_passes: int
) -> None:
    failing = FakeVerify(num_free_passes=num_passes, failure=grpc.StatusCode.INTERNAL)
    other = FakeVerify(num_sessions=9)
    draft = FakeDraft(num_proposed=3, is_wrong=True)
    async with running(await pool_of(serve, failing, other), await serve(draft)) as backends:
        await all_used(backends.verify)
        await backends.connect(10)
        outcome = await generate(backends, strategy)  # checks the tokens
    # gRPC may lose the status beside a write of the session; then the same replica is tried again.
    assert len(failing.opened) in ((1, 2) if num_passes == 0 else (1,))
    assert len(other.opened) == 1
    assert not outcome.statistics.fallback_reason


async def test_a_replica_whose_pass_fails_alone_is_left_for_a_while(serve: Serve) -> None:
    failing = FakeVerify(num_free_passes=0, failure=grpc.StatusCode.INTERNAL)
    other = FakeVerify(num_sessions=9)
    async with running(await pool_of(serve, failing, other)) as backends:
        await all_used(backends.verify)
        for _ in range(3):
            await generate(backends, Strategy.AUTOREGRESSIVE)
    assert [len(one.opened) for one in (failing, other)] == [1, 3]


async def test_a_failed_session_harms_no_other(serve: Serve) -> None:
    service = FakeVerify(num_free_passes=0)
    async with running(await serve(service)) as backends:
        await backends.connect(10)
        healthy = asyncio.create_task(generate(backends, Strategy.AUTOREGRESSIVE))
        await becomes_true(lambda: len(service.opened) == 1)  # its first pass waits
        service.failure = grpc.StatusCode.INTERNAL
        with pytest.raises(InternalError):
            await generate(backends, Strategy.AUTOREGRESSIVE)
        service.failure = None
        service.may_go_on.set()
        await healthy
    assert len(service.opened) == 2


class Astray(FakeVerify):
    """Writes a token that the vocabulary does not have."""

    async def Verify(  # type: ignore[override]  # noqa: N802
        self, request_iterator: object, context: Context
    ) -> None:
        await context.write(codec.verdict_to_proto(Verdict(0, 2, 0, 0, 50)))
        await asyncio.Event().wait()


async def test_a_token_outside_the_vocabulary_never_reaches_a_client(serve: Serve) -> None:
    async with running(await serve(Astray())) as backends:
        await backends.connect(10)
        with pytest.raises(InternalError, match="token id 50 is outside the vocabulary"):
            await generate(backends, Strategy.AUTOREGRESSIVE)


class Crashing(FakeVerify):
    """Loses its connections at the first open, as a process that crashes does."""

    host: Host
    crash: asyncio.Task[None] | None = None

    async def Verify(  # type: ignore[override]  # noqa: N802
        self, request_iterator: object, context: Context
    ) -> None:
        self.opened.append(verify_pb2.VerifyOpen())
        # Not awaited here: the end of the server cancels this handler.
        self.crash = asyncio.create_task(self.host.server.stop(0))
        await asyncio.Event().wait()


async def test_a_request_takes_down_no_more_than_two_replicas(
    serve: Serve, hosts: list[Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.links._REFUSAL_SECONDS", 0.0)
    services = [Crashing() for _ in range(4)]
    addresses = await pool_of(serve, *services)
    for service, host in zip(services, hosts, strict=True):
        service.host = host
    async with running(addresses) as backends:
        await all_used(backends.verify)
        with pytest.raises(UnavailableError):
            await generate(backends, Strategy.AUTOREGRESSIVE)
    crashed = [service.crash for service in services if service.crash is not None]
    await asyncio.gather(*crashed)
    assert len(crashed) == 2


# A verify replica that does not answer


@pytest.mark.parametrize("strategy", Strategy)
@pytest.mark.parametrize("num_passes", [0, 1, 4])
async def test_a_session_leaves_a_replica_that_sends_no_verdict(
    serve: Serve, strategy: Strategy, num_passes: int
) -> None:
    silent, other = FakeVerify(num_free_passes=num_passes), FakeVerify(num_sessions=9)
    draft = FakeDraft(num_proposed=2)
    async with running(await pool_of(serve, silent, other), await serve(draft)) as backends:
        await all_used(backends.verify)
        await backends.connect(10)
        await generate(backends, strategy, verify_timeout_seconds=0.2)
        assert [len(one.opened) for one in (silent, other)] == [1, 1]
        for _ in range(2):
            await generate(backends, strategy, verify_timeout_seconds=5.0)
    assert [len(one.opened) for one in (silent, other)] == [1, 3]


async def test_without_another_replica_a_late_verdict_is_an_error_that_says_so(
    serve: Serve,
) -> None:
    async with running(await serve(FakeVerify(num_free_passes=0))) as backends:
        await backends.connect(10)
        with pytest.raises(UnavailableError, match=r"no verdict within 0\.2 s.*start one"):
            await generate(backends, Strategy.AUTOREGRESSIVE, verify_timeout_seconds=0.2)


async def test_a_session_whose_engine_answers_no_calls_leaves_before_the_verdict_is_late(
    serve: Serve,
) -> None:
    hung, other = FakeVerify(num_free_passes=0), FakeVerify(num_sessions=9)
    address = await serve(hung)
    addresses = f"{address},{await serve(other)}"
    async with running(addresses, replica_timeout_seconds=0.5) as backends:
        await all_used(backends.verify)
        hung.hangs = True
        await generate(
            backends,
            Strategy.AUTOREGRESSIVE,
            verify_timeout_seconds=60.0,
            replica_timeout_seconds=0.5,
        )
        assert [len(one.opened) for one in (hung, other)] == [1, 1]
        (status,) = (one.status for one in backends.verify.replicas if one.address == address)
        assert status.state is ReplicaState.AWAY
        assert "has not answered" in status.reason


async def test_an_engine_that_hangs_gets_no_sessions_until_it_answers(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    hung, other = FakeVerify(), FakeVerify(num_sessions=9)  # the hung one has the least load
    address = await serve(hung)
    addresses = f"{address},{await serve(other)}"
    async with running(addresses, replica_timeout_seconds=1.0) as backends:

        def is_used() -> bool:
            return address in {replica.address for replica in backends.verify.usable}

        await all_used(backends.verify)
        hung.hangs = True
        await becomes_true(lambda: not is_used())
        for _ in range(3):
            await generate(backends, Strategy.AUTOREGRESSIVE)
        assert not hung.opened
        await becomes_true(lambda: f"no longer using verify replica {address}" in caplog.text)
        hung.hangs = False
        await becomes_true(is_used)
        await becomes_true(lambda: f"using verify replica {address} again" in caplog.text)
    assert caplog.text.count(f"no longer using verify replica {address}") == 1


async def test_a_late_engine_is_not_preferred(serve: Serve) -> None:
    late, other = FakeVerify(), FakeVerify(num_sessions=9)
    async with running(await pool_of(serve, late, other)) as backends:
        await all_used(backends.verify)
        late.hangs = True
        (replica,) = (one for one in backends.verify.replicas if not one.load.num_sessions)
        await becomes_true(lambda: replica.answers.is_late(time.monotonic()))
        assert len(backends.verify.usable) == 2
        await generate(backends, Strategy.AUTOREGRESSIVE)
    assert [len(one.opened) for one in (late, other)] == [0, 1]


async def test_a_replica_that_cannot_be_compared_harms_no_other(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compare(model: ModelDescription, pool: ModelDescription) -> str | None:
        if model.name == "odd":
            raise ZeroDivisionError
        return explain_mismatch(model, pool)

    monkeypatch.setattr("orchestrator.backends.explain_mismatch", compare)
    odd = await serve(FakeVerify(replace(MODEL, name="odd")))
    names = await serve(FakeVerify()), odd
    async with running(",".join(names)) as backends:
        await becomes_true(lambda: "cannot be read" in backends.verify.problem())
        await becomes_true(lambda: len(backends.verify.usable) == 1)
        await generate(backends, Strategy.AUTOREGRESSIVE)
    assert f"the replica {odd} cannot be used" in caplog.text


# A draft that does not answer

Silencing = Callable[[FakeDraft], None]


def never_proposes(draft: FakeDraft) -> None:
    draft.num_answered = 0


def stops_proposing(draft: FakeDraft) -> None:
    draft.num_answered = 3


def answers_no_rollback(draft: FakeDraft) -> None:
    draft.answers, draft.is_wrong, draft.num_proposed = False, True, 2


@pytest.mark.parametrize("strategy", DRAFTING)
@pytest.mark.parametrize("silence", [never_proposes, stops_proposing, answers_no_rollback])
async def test_a_silent_draft_costs_one_wait_and_the_statistics_say_so(
    serve: Serve, strategy: Strategy, silence: Silencing
) -> None:
    draft = FakeDraft()
    silence(draft)
    async with running(await serve(FakeVerify()), await serve(draft)) as backends:
        await backends.connect(10)
        started = time.monotonic()
        outcome = await generate(backends, strategy, draft_timeout_seconds=0.4)
        waited = time.monotonic() - started
        assert waited < 3 * 0.4  # and not one wait for each of the 12 tokens
        if strategy is Strategy.SPECULATIVE:
            assert "draft service: no" in outcome.statistics.fallback_reason
            later = await generate(backends, strategy, draft_timeout_seconds=30.0)
            assert "draft service cannot be used" in later.statistics.fallback_reason
            assert len(draft.opened) == 1


async def test_a_draft_that_never_proposed_is_named_though_nothing_waited_for_it(
    serve: Serve,
) -> None:
    draft, verify = FakeDraft(num_answered=0), FakeVerify(num_free_passes=6)
    async with running(await serve(verify), await serve(draft)) as backends:
        await backends.connect(10)
        asyncio.get_running_loop().call_later(0.1, verify.may_go_on.set)
        outcome = await generate(backends, Strategy.AMUSD, draft_timeout_seconds=30.0)
    assert "no proposal in the last" in outcome.statistics.fallback_reason


async def test_a_draft_that_never_proposed_is_replaced_by_another(serve: Serve) -> None:
    silent, other = FakeDraft(num_answered=0), FakeDraft(num_sessions=9)
    drafts = await pool_of(serve, silent, other)
    async with running(await serve(FakeVerify()), drafts) as backends:
        await backends.connect(10)
        await all_used(backends.draft)
        for _ in range(2):
            outcome = await generate(backends, Strategy.SPECULATIVE, draft_timeout_seconds=0.3)
            assert not outcome.statistics.fallback_reason
    assert [len(one.opened) for one in (silent, other)] == [1, 2]


@pytest.mark.parametrize("strategy", DRAFTING)
async def test_a_draft_that_fails_is_replaced_once(serve: Serve, strategy: Strategy) -> None:
    drafts = [FakeDraft(refusal=grpc.StatusCode.INTERNAL) for _ in range(4)]
    async with running(await serve(FakeVerify()), await pool_of(serve, *drafts)) as backends:
        await backends.connect(10)
        await all_used(backends.draft)
        outcome = await generate(backends, strategy)
    opened = sorted(len(draft.opened) for draft in drafts)
    assert opened[:2] == [0, 0]
    # gRPC may lose the status of a refusal; then the same replica is tried again.
    assert all(1 <= number <= 2 for number in opened[2:])
    assert "draft service" in outcome.statistics.fallback_reason


async def test_a_draft_that_answers_again_is_used_again(serve: Serve) -> None:
    draft = FakeDraft(num_answered=0)
    async with running(await serve(FakeVerify()), await serve(draft)) as backends:
        await backends.connect(10)
        first = await generate(backends, Strategy.SPECULATIVE, draft_timeout_seconds=0.1)
        assert first.statistics.fallback_reason
        draft.num_answered = 1 << 30
        await becomes_true(lambda: bool(backends.draft.usable))
        for _ in range(2):
            again = await generate(backends, Strategy.SPECULATIVE)
            assert not again.statistics.fallback_reason


async def test_an_answer_that_its_session_cannot_take_ends_no_other_session(serve: Serve) -> None:
    class Faulty:
        errors: list[AmusdError]

        def __init__(self) -> None:
            self.errors = []

        def answered(self, response: draft_pb2.RollbackResponse) -> None:
            raise ZeroDivisionError

        def rollbacks_lost(self, error: AmusdError) -> None:
            self.errors.append(error)

    draft = FakeDraft()
    address = await serve(draft)
    async with open_channel(address) as channel:
        rollbacks, faulty = DraftStub(channel).rollbacks, Faulty()
        rollbacks.attach("faulty", faulty)
        rollbacks.send(draft_pb2.RollbackRequest(session_id="faulty", epoch=1))
        await becomes_true(lambda: len(faulty.errors) == 1)
        rollbacks.send(draft_pb2.RollbackRequest(session_id="faulty", epoch=2))
        await becomes_true(lambda: len(faulty.errors) == 2)
    assert len(draft.rollback_streams) == 1
