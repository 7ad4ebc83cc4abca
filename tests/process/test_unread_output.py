"""Peers that do not read: their sessions end in time, and no other session is affected."""

import os
import queue
import time
from collections import deque
from collections.abc import Iterator

import grpc
import pytest

from amusd.client import Client, Options
from amusd.prompts import Prompt
from amusd.protocol.errors import LimitExceededError
from amusd.protocol.strategy import Strategy
from amusd.v1 import draft_pb2, draft_pb2_grpc, verify_pb2, verify_pb2_grpc
from amusd.v1 import orchestrator_pb2 as pb
from amusd.v1 import orchestrator_pb2_grpc as rpc
from tests.process.services import VOCABULARY, Service, Starter, Trio, becomes_true, start_trio
from tests.process.synthetic_models import expected_output
from tests.process.test_sharing import draft_info, nothing_is_left, verify_info

pytestmark = pytest.mark.process

TIMEOUT_SECONDS = 0.5
GRACE_SECONDS = 60.0
MODEL = f"synthetic:vocabulary={VOCABULARY},context=50000"
# gRPC reads ahead of its caller; a client that reads ahead little is noticed soon.
LITTLE_AHEAD = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
PROMPT = (1, 2)


FLAGS = ("--client-write-timeout", str(TIMEOUT_SECONDS), "--grace", str(GRACE_SECONDS))


@pytest.fixture(scope="module")
def trio(start_for_all: Starter) -> Trio:
    draft_flags = ("--max-lookahead", "30000")
    return start_trio(
        start_for_all, MODEL, MODEL, draft_flags=draft_flags, orchestrator_flags=FLAGS
    )


@pytest.fixture(autouse=True)
def _empty_log(trio: Trio) -> None:
    """Forget the sessions of the tests before."""
    os.truncate(trio.orchestrator.log, 0)


@pytest.fixture
def stub(trio: Trio) -> Iterator[rpc.OrchestratorServiceStub]:
    """The orchestrator as a client sees it that reads only what it needs."""
    with grpc.insecure_channel(trio.orchestrator.address, options=LITTLE_AHEAD) as channel:
        yield rpc.OrchestratorServiceStub(channel)


def long_request(strategy: pb.Strategy.ValueType = pb.STRATEGY_AMUSD) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        tokens=pb.TokenIds(ids=PROMPT), max_tokens=40_000, strategy=strategy, ignore_eos=True
    )


def has_given_up(service: Service) -> bool:
    """Whether an orchestrator has ended a session because its client does not read."""
    lines = service.log.read_text().splitlines()
    return any("session ended" in line and "RESOURCE_EXHAUSTED" in line for line in lines)


@pytest.mark.parametrize("strategy", [pb.STRATEGY_AUTOREGRESSIVE, pb.STRATEGY_AMUSD])
def test_a_client_that_does_not_read_is_given_up_and_its_memory_freed(
    trio: Trio, stub: rpc.OrchestratorServiceStub, strategy: pb.Strategy.ValueType
) -> None:
    call = stub.Generate(long_request(strategy), timeout=60)
    responses = iter(call)
    tokens = list(next(responses).chunk.token_ids)
    assert verify_info(trio.verify).cache.num_reserved_tokens == 40_000 + len(PROMPT)
    # From here on nothing is read, and the call stays open.
    assert becomes_true(lambda: nothing_is_left(trio))
    assert becomes_true(lambda: has_given_up(trio.orchestrator))

    def read_the_rest() -> None:
        for response in responses:
            tokens.extend(response.chunk.token_ids)

    with pytest.raises(grpc.RpcError) as caught:
        read_the_rest()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    details = str(caught.value.details())
    assert "has not read for 0.5 s" in details
    assert "--client-write-timeout" in details
    assert "\n" not in details
    # What was written before is right.
    assert 0 < len(tokens) < 40_000
    assert tokens == expected_output(MODEL, PROMPT, len(tokens))


def test_a_client_that_does_not_read_holds_up_no_other(
    trio: Trio, stub: rpc.OrchestratorServiceStub
) -> None:
    call = stub.Generate(long_request(), timeout=60)
    next(iter(call))
    with Client(trio.orchestrator.address, timeout_seconds=60) as client:
        while not has_given_up(trio.orchestrator):
            generation = client.generate(Prompt(tokens=(3,)), Options(Strategy.AMUSD, 20)).wait()
            assert generation.tokens == expected_output(MODEL, (3,), 20)
            assert not generation.summary().fallback_reason
    call.cancel()  # type: ignore[no-untyped-call]
    assert becomes_true(lambda: nothing_is_left(trio))


def test_an_unread_generation_of_the_python_client_is_given_up_beside_another(trio: Trio) -> None:
    with Client(trio.orchestrator.address, timeout_seconds=60) as client:
        options = Options(Strategy.AUTOREGRESSIVE, 40_000, ignore_eos=True)
        unread = client.generate(Prompt(tokens=PROMPT), options)
        while not has_given_up(trio.orchestrator):
            generation = client.generate(Prompt(tokens=(3,)), Options(Strategy.AMUSD, 20)).wait()
            assert generation.tokens == expected_output(MODEL, (3,), 20)
        assert becomes_true(lambda: nothing_is_left(trio))
        with pytest.raises(LimitExceededError, match="has not read"):
            unread.wait()
        assert unread.tokens == expected_output(MODEL, PROMPT, len(unread.tokens))


def test_a_client_that_does_not_read_the_completion_is_given_up(
    trio: Trio, stub: rpc.OrchestratorServiceStub
) -> None:
    # The timeline in the completion is longer than what the client reads ahead.
    request = pb.GenerateRequest(
        tokens=pb.TokenIds(ids=PROMPT), max_tokens=40, ignore_eos=True, timeline=True
    )
    call = stub.Generate(request, timeout=60)
    next(iter(call))
    assert becomes_true(lambda: nothing_is_left(trio))
    assert becomes_true(lambda: has_given_up(trio.orchestrator))
    call.cancel()  # type: ignore[no-untyped-call]


def test_a_client_that_was_given_up_does_not_delay_the_end_of_the_service(
    trio: Trio, start: Starter
) -> None:
    addresses = ("--verify", trio.verify.address, "--draft", trio.draft.address)
    orchestrator = start("orchestrator", *addresses, *FLAGS)
    orchestrator.wait_until_serving()
    with grpc.insecure_channel(orchestrator.address, options=LITTLE_AHEAD) as channel:
        call = rpc.OrchestratorServiceStub(channel).Generate(long_request(), timeout=60)
        next(iter(call))
        assert becomes_true(lambda: has_given_up(orchestrator))
        began = time.monotonic()
        orchestrator.process.terminate()
        assert orchestrator.process.wait(20) == 0
        assert time.monotonic() - began < GRACE_SECONDS / 3
        call.cancel()  # type: ignore[no-untyped-call]


# The streams of the draft and verify service


def test_a_verify_stream_that_nobody_reads_loses_its_session(trio: Trio) -> None:
    service = trio.verify
    opening = verify_pb2.VerifyOpen(session_id="unread", token_ids=PROMPT, max_position=40_000)
    passes = verify_pb2.VerifyProposals(position=30_000)  # as many passes without proposals
    requests: queue.SimpleQueue[verify_pb2.VerifyRequest | None] = queue.SimpleQueue()
    requests.put(verify_pb2.VerifyRequest(open=opening))
    requests.put(verify_pb2.VerifyRequest(proposals=passes))
    with grpc.insecure_channel(service.address, options=LITTLE_AHEAD) as channel:
        stub = verify_pb2_grpc.VerifyServiceStub(channel)
        call = stub.Verify(iter(requests.get, None), timeout=60)
        next(iter(call))
        assert becomes_true(lambda: verify_info(service).num_sessions == 0, within_seconds=40)
        assert verify_info(service).cache.num_reserved_tokens == 0
        with pytest.raises(grpc.RpcError) as caught:
            deque(call, maxlen=0)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "read faster" in str(caught.value.details())
        requests.put(None)


def test_a_propose_stream_that_nobody_reads_loses_its_session(trio: Trio) -> None:
    service = trio.draft
    opening = draft_pb2.ProposeOpen(
        session_id="unread", token_ids=PROMPT, max_position=40_000, lookahead=30_000
    )
    requests: queue.SimpleQueue[draft_pb2.ProposeRequest | None] = queue.SimpleQueue()
    requests.put(draft_pb2.ProposeRequest(open=opening))
    with grpc.insecure_channel(service.address, options=LITTLE_AHEAD) as channel:
        stub = draft_pb2_grpc.DraftServiceStub(channel)
        call = stub.Propose(iter(requests.get, None), timeout=60)
        next(iter(call))
        assert becomes_true(lambda: draft_info(service).num_sessions == 0, within_seconds=40)
        assert draft_info(service).cache.num_reserved_tokens == 0
        with pytest.raises(grpc.RpcError) as caught:
            deque(call, maxlen=0)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "read faster" in str(caught.value.details())
        requests.put(None)
