"""Services that shut down: health, refusals, open sessions and final statuses."""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from amusd.client import Client, Generation, Options
from amusd.prompts import Prompt
from amusd.protocol.errors import UnavailableError
from amusd.protocol.strategy import Strategy
from amusd.v1 import draft_pb2, draft_pb2_grpc, verify_pb2, verify_pb2_grpc
from tests.process.rollbacks import Rollbacks
from tests.process.services import VOCABULARY, Service, Starter, start_trio
from tests.process.synthetic_models import expected_output

pytestmark = pytest.mark.process

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
# 10 ms a token: 100 tokens take a second, long enough for a signal to come in the middle.
SLOW = f"synthetic:pass_ms=10,vocabulary={VOCABULARY},context=6000"
LONG_GRACE = ("--grace", "60")


def watch(channel: grpc.Channel, name: str = "") -> Iterator[int]:
    """Yield the health of ``name``, as it changes."""
    request = health_pb2.HealthCheckRequest(service=name)
    for answer in health_pb2_grpc.HealthStub(channel).Watch(request, timeout=60):
        yield int(answer.status)


def check(channel: grpc.Channel, name: str = "") -> int:
    request = health_pb2.HealthCheckRequest(service=name)
    return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=10).status)


def tell_to_end(service: Service, channel: grpc.Channel) -> None:
    """Send SIGTERM and wait until health shows it."""
    seen = watch(channel)
    assert next(seen) == SERVING
    service.process.terminate()
    assert next(seen) == NOT_SERVING


def read_and_tell(generation: Generation, service: Service) -> None:
    """Read to the end, and send SIGTERM to ``service`` on the way."""
    told = False
    for _ in generation:
        if not told and len(generation.tokens) > 10:
            service.process.terminate()
            told = True


def open_draft(
    stub: draft_pb2_grpc.DraftServiceStub, session_id: str
) -> "tuple[SimpleQueue[draft_pb2.ProposeRequest | None], Iterator[draft_pb2.ProposeResponse]]":
    """Open a session that drafts 4 tokens after 3, and return both ends of its stream."""
    requests: SimpleQueue[draft_pb2.ProposeRequest | None] = SimpleQueue()
    opening = draft_pb2.ProposeOpen(
        session_id=session_id, token_ids=[1, 2, 3], lookahead=4, max_position=100
    )
    requests.put(draft_pb2.ProposeRequest(open=opening))
    return requests, iter(stub.Propose(iter(requests.get, None), timeout=60))


def test_a_draft_service_that_drains_still_serves_its_open_sessions(start: Starter) -> None:
    service = start("draft", "--model", SLOW, *LONG_GRACE)
    service.wait_until_serving()
    with service.channel() as channel:
        stub = draft_pb2_grpc.DraftServiceStub(channel)
        requests, proposals = open_draft(stub, "old")
        next(proposals)
        rollbacks = Rollbacks(stub)
        assert not rollbacks.roll_back(1, 4, 9, "old").HasField("error")
        tell_to_end(service, channel)
        assert check(channel, "amusd.v1.DraftService") == NOT_SERVING
        assert check(channel, "live") == SERVING

        _, refused = open_draft(stub, "new")
        with pytest.raises(grpc.RpcError) as caught:
            next(refused)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in str(caught.value.details())

        # Open rollback streams are served until the end, and so are new ones.
        assert not rollbacks.roll_back(2, 5, 9, "old").HasField("error")
        assert not Rollbacks(stub).roll_back(3, 6, 9, "old").HasField("error")
        assert any(one.proposal.epoch == 3 for one in proposals)
        requests.put(None)
        assert not [one for one in proposals if one.proposal.epoch > 3]
        # An open rollback stream does not delay the end.
        with pytest.raises(grpc.RpcError) as caught:
            rollbacks.answer()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert service.process.wait(20) == 0
    assert "Traceback" not in service.log.read_text()


def test_a_session_on_a_new_connection_is_refused_with_the_reason(start: Starter) -> None:
    service = start("verify", "--model", SLOW, *LONG_GRACE)
    service.wait_until_serving()
    opening = verify_pb2.VerifyRequest(
        open=verify_pb2.VerifyOpen(session_id="a", token_ids=[1], max_position=50)
    )
    more: SimpleQueue[verify_pb2.VerifyRequest | None] = SimpleQueue()
    more.put(opening)
    with service.channel() as channel:
        stub = verify_pb2_grpc.VerifyServiceStub(channel)
        verdicts = iter(stub.Verify(iter(more.get, None), timeout=60))
        next(verdicts)
        tell_to_end(service, channel)
        with service.channel() as fresh, pytest.raises(grpc.RpcError) as caught:
            list(verify_pb2_grpc.VerifyServiceStub(fresh).Verify(iter([opening]), timeout=10))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in str(caught.value.details())
        more.put(None)
        list(verdicts)
    assert service.process.wait(20) == 0


@pytest.mark.parametrize("role", ["orchestrator", "draft", "verify"])
def test_a_generation_outlives_the_signal_within_the_grace(start: Starter, role: str) -> None:
    trio = start_trio(start, SLOW, SLOW, LONG_GRACE, LONG_GRACE, LONG_GRACE)
    service: Service = getattr(trio, role)
    with Client(trio.orchestrator.address, timeout_seconds=60) as client:
        generation = client.generate(Prompt(tokens=(2,)), Options(Strategy.SPECULATIVE, 200))
        read_and_tell(generation, service)
        assert generation.tokens == expected_output(SLOW, (2,), 200)
        assert not generation.summary().fallback_reason
    assert service.process.wait(20) == 0


def test_a_session_that_outlasts_the_grace_ends_with_the_reason(start: Starter) -> None:
    trio = start_trio(start, SLOW, SLOW, orchestrator_flags=("--grace", "0.5"))
    with Client(trio.orchestrator.address, timeout_seconds=60) as client:
        generation = client.generate(Prompt(tokens=(2,)), Options(Strategy.AMUSD, 5000))
        with pytest.raises(UnavailableError, match=r"shutting down.*cut off after 0\.5 s"):
            read_and_tell(generation, trio.orchestrator)
    assert trio.orchestrator.process.wait(20) == 0
    assert "Traceback" not in trio.orchestrator.log.read_text()


def test_a_second_signal_does_not_wait_for_the_grace(start: Starter) -> None:
    service = start("draft", "--model", SLOW, *LONG_GRACE)
    service.wait_until_serving()
    with service.channel() as channel:
        _, proposals = open_draft(draft_pb2_grpc.DraftServiceStub(channel), "a")
        next(proposals)
        with ThreadPoolExecutor(1) as reader:
            rest = reader.submit(list, proposals)
            tell_to_end(service, channel)
            began = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            assert service.process.wait(20) == 0
            assert time.monotonic() - began < 15  # of a grace of 60 seconds
            error = rest.exception(10)
    assert isinstance(error, grpc.RpcError)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "by a second signal" in str(error.details())


def test_health_watches_do_not_delay_the_end(start: Starter) -> None:
    service = start("verify", "--model", SLOW, *LONG_GRACE)
    service.wait_until_serving()
    with service.channel() as channel:
        seen = watch(channel, "live")
        assert next(seen) == SERVING
        service.process.terminate()
        assert service.process.wait(20) == 0
        with pytest.raises(grpc.RpcError):
            next(seen)


def test_a_connection_over_its_maximum_age_is_closed_without_harm_to_its_calls(
    start: Starter,
) -> None:
    trio = start_trio(start, SLOW, SLOW, orchestrator_flags=("--max-connection-age", "0.5"))
    with Client(trio.orchestrator.address, timeout_seconds=60) as client:
        for prompt in ((2,), (3,)):  # two seconds each
            generation = client.generate(Prompt(tokens=prompt), Options(Strategy.AMUSD, 200)).wait()
            assert generation.tokens == expected_output(SLOW, prompt, 200)
