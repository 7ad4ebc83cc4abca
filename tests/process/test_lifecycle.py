"""Sessions that end early, and services that are lost and come back."""

import signal
from concurrent.futures import ThreadPoolExecutor

import grpc
import psutil
import pytest

from amusd.client import Client, Options
from amusd.prompts import Prompt
from amusd.protocol.errors import UnavailableError
from amusd.protocol.strategy import Strategy
from amusd.v1 import draft_pb2, draft_pb2_grpc, verify_pb2, verify_pb2_grpc
from amusd.v1 import orchestrator_pb2 as pb
from amusd.v1 import orchestrator_pb2_grpc as rpc
from tests.process.services import (
    DRAFT_MODEL,
    VERIFY_MODEL,
    Service,
    Starter,
    Trio,
    becomes_true,
    start_trio,
)
from tests.process.synthetic_models import expected_output

pytestmark = pytest.mark.process


def num_sessions(trio: Trio) -> tuple[int, int]:
    """Return the sessions open in the draft and in the verify service."""
    with trio.draft.channel() as draft, trio.verify.channel() as verify:
        return (
            draft_pb2_grpc.DraftServiceStub(draft)
            .GetDraftInfo(draft_pb2.GetDraftInfoRequest(), timeout=10)
            .num_sessions,
            verify_pb2_grpc.VerifyServiceStub(verify)
            .GetVerifyInfo(verify_pb2.GetVerifyInfoRequest(), timeout=10)
            .num_sessions,
        )


def long_request(prompt: int = 1, num_tokens: int = 500) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        tokens=pb.TokenIds(ids=[prompt]), max_tokens=num_tokens, strategy=pb.STRATEGY_AMUSD
    )


def test_a_client_that_cancels_ends_the_session_everywhere(trio: Trio) -> None:
    with trio.orchestrator.channel() as channel:
        call = rpc.OrchestratorServiceStub(channel).Generate(long_request(), timeout=60)
        responses = iter(call)
        next(responses)
        assert num_sessions(trio) == (1, 1)
        call.cancel()  # type: ignore[no-untyped-call]
        assert becomes_true(lambda: num_sessions(trio) == (0, 0))


def test_a_deadline_ends_the_session_everywhere(trio: Trio) -> None:
    with trio.orchestrator.channel() as channel, pytest.raises(grpc.RpcError) as caught:
        list(rpc.OrchestratorServiceStub(channel).Generate(long_request(), timeout=0.3))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert becomes_true(lambda: num_sessions(trio) == (0, 0))


def test_a_session_that_is_over_is_freed_everywhere(trio: Trio, client: Client) -> None:
    client.generate(Prompt(tokens=(1,)), Options(max_tokens=5)).wait()
    assert becomes_true(lambda: num_sessions(trio) == (0, 0))


def resident_bytes(service: Service) -> int:
    return int(psutil.Process(service.process.pid).memory_info().rss)


def open_and_cancel(trio: Trio, number: int) -> None:
    """Run a session until it has probably been rolled back, and cancel it."""
    with trio.orchestrator.channel() as channel:
        request = long_request(prompt=number % 512)
        call = rpc.OrchestratorServiceStub(channel).Generate(request, timeout=60)
        for _, _response in zip(range(3), call, strict=False):
            pass
        call.cancel()  # type: ignore[no-untyped-call]


@pytest.mark.slow
def test_a_thousand_sessions_leave_nothing_behind(start: Starter) -> None:
    trio = start_trio(
        start,
        "synthetic:vocabulary=512,context=600,batch=8,pass_ms=1",
        "synthetic:vocabulary=512,context=600,batch=8,agreement=0.3",
    )
    services = (trio.draft, trio.verify, trio.orchestrator)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: open_and_cancel(trio, number), range(200)))
        before = [resident_bytes(service) for service in services]
        list(pool.map(lambda number: open_and_cancel(trio, number), range(1000)))
    assert becomes_true(lambda: num_sessions(trio) == (0, 0))
    growth = [resident_bytes(one) - old for one, old in zip(services, before, strict=True)]
    assert max(growth) < 16 * 2**20, growth


def test_a_draft_that_dies_costs_no_token(start: Starter) -> None:
    trio = start_trio(start)
    with Client(trio.orchestrator.address, timeout_seconds=60) as client:
        generation = client.generate(Prompt(tokens=(2,)), Options(Strategy.AMUSD, 300))
        for _ in generation:
            if trio.draft.process.poll() is None and len(generation.tokens) > 20:
                trio.draft.process.kill()
        assert generation.tokens == expected_output(VERIFY_MODEL, (2,), 300)
        assert "draft service" in generation.summary().fallback_reason
        for strategy in (Strategy.SPECULATIVE, Strategy.AMUSD):
            later = client.generate(Prompt(tokens=(3,)), Options(strategy, 20)).wait()
            assert later.tokens == expected_output(VERIFY_MODEL, (3,), 20)
            assert later.summary().fallback_reason


@pytest.mark.parametrize("strategy", [Strategy.SPECULATIVE, Strategy.AMUSD])
def test_a_draft_that_hangs_costs_no_token(start: Starter, strategy: Strategy) -> None:
    trio = start_trio(start)
    with Client(trio.orchestrator.address, timeout_seconds=60) as client:
        generation = client.generate(Prompt(tokens=(2,)), Options(strategy, 300))
        for _ in generation:
            if len(generation.tokens) > 20:
                trio.draft.process.send_signal(signal.SIGSTOP)
        trio.draft.process.send_signal(signal.SIGCONT)
    assert generation.tokens == expected_output(VERIFY_MODEL, (2,), 300)
    assert "draft service: no" in generation.summary().fallback_reason


def test_a_draft_that_comes_back_is_used_and_rolled_back_again(start: Starter) -> None:
    trio = start_trio(start)
    trio.draft.process.kill()
    trio.draft.process.wait()
    port = trio.draft.address.rpartition(":")[2]
    with Client(trio.orchestrator.address, timeout_seconds=60) as client:
        options = Options(Strategy.AMUSD, 20)
        assert client.generate(Prompt(tokens=(3,)), options).wait().summary().fallback_reason
        start("draft", "--model", DRAFT_MODEL, "--port", port).wait_until_serving()
        assert becomes_true(
            lambda: (
                not client.generate(Prompt(tokens=(3,)), options).wait().summary().fallback_reason
            )
        )
        # The rollback stream is opened anew, too.
        for strategy in (Strategy.SPECULATIVE, Strategy.AMUSD):
            generation = client.generate(Prompt(tokens=(3,)), Options(strategy, 60)).wait()
            assert generation.tokens == expected_output(VERIFY_MODEL, (3,), 60)
            assert not generation.summary().fallback_reason
            assert generation.summary().num_rollbacks > 1


def test_a_draft_that_comes_back_with_another_vocabulary_is_left_out(start: Starter) -> None:
    trio = start_trio(start)
    trio.draft.process.kill()
    trio.draft.process.wait()
    port = trio.draft.address.rpartition(":")[2]
    start("draft", "--model", "synthetic:vocabulary=700", "--port", port).wait_until_serving()
    with Client(trio.orchestrator.address, timeout_seconds=60) as client:

        def refused_for_its_vocabulary() -> bool:
            options = Options(Strategy.AMUSD, 20)
            generation = client.generate(Prompt(tokens=(3,)), options).wait()
            assert generation.tokens == expected_output(VERIFY_MODEL, (3,), 20)
            return "vocabular" in generation.summary().fallback_reason

        assert becomes_true(refused_for_its_vocabulary)


def test_a_verify_service_that_dies_ends_its_sessions_and_may_come_back(start: Starter) -> None:
    trio = start_trio(start)
    port = trio.verify.address.rpartition(":")[2]
    with Client(trio.orchestrator.address, timeout_seconds=60) as client:
        generation = client.generate(Prompt(tokens=(2,)), Options(Strategy.AMUSD, 400))

        def read() -> None:
            for _ in generation:
                trio.verify.process.kill()

        with pytest.raises(UnavailableError, match="verify service"):
            read()
        trio.verify.process.wait()
        start("verify", "--model", VERIFY_MODEL, "--port", port).wait_until_serving()

        def serves_again() -> bool:
            try:
                later = client.generate(Prompt(tokens=(2,)), Options(Strategy.AMUSD, 20)).wait()
            except UnavailableError:
                return False
            return later.tokens == expected_output(VERIFY_MODEL, (2,), 20)

        assert becomes_true(serves_again)


def test_prompt_lookup_drafts_without_a_model(start: Starter) -> None:
    trio = start_trio(start, draft_model="prompt-lookup")
    with Client(trio.orchestrator.address, timeout_seconds=60) as client:
        for strategy in (Strategy.SPECULATIVE, Strategy.AMUSD):
            generation = client.generate(Prompt(tokens=(1, 2, 1, 2)), Options(strategy, 50)).wait()
            assert generation.tokens == expected_output(VERIFY_MODEL, (1, 2, 1, 2), 50)
            assert not generation.summary().fallback_reason
