"""Sessions that share passes and memory, through all three services."""

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from amusd.client import Client, Generation, Options
from amusd.prompts import Prompt
from amusd.protocol.errors import LimitExceededError
from amusd.protocol.strategy import Strategy
from amusd.v1 import draft_pb2, draft_pb2_grpc, verify_pb2, verify_pb2_grpc
from tests.process.services import (
    VOCABULARY,
    Service,
    Starter,
    Trio,
    amusd,
    becomes_true,
    start_trio,
)
from tests.process.synthetic_models import expected_output

pytestmark = pytest.mark.process

MODEL = f"synthetic:pass_ms=4,vocabulary={VOCABULARY},context=600"
DRAFT = f"{MODEL},agreement=0.7,pass_ms=1"


def verify_info(service: Service) -> verify_pb2.GetVerifyInfoResponse:
    with service.channel() as channel:
        stub = verify_pb2_grpc.VerifyServiceStub(channel)
        return stub.GetVerifyInfo(verify_pb2.GetVerifyInfoRequest(), timeout=10)


def draft_info(service: Service) -> draft_pb2.GetDraftInfoResponse:
    with service.channel() as channel:
        stub = draft_pb2_grpc.DraftServiceStub(channel)
        return stub.GetDraftInfo(draft_pb2.GetDraftInfoRequest(), timeout=10)


def nothing_is_left(trio: Trio) -> bool:
    """Whether no session is open, waiting, or holding memory anywhere."""
    return all(
        (info.num_sessions, info.num_waiting, info.cache.num_reserved_tokens) == (0, 0, 0)
        for info in (verify_info(trio.verify), draft_info(trio.draft))
    )


def generate(trio: Trio, prompts: list[tuple[int, ...]], options: Options) -> list[Generation]:
    """Generate for all prompts at the same time."""

    def one(prompt: tuple[int, ...]) -> Generation:
        with Client(trio.orchestrator.address, timeout_seconds=60) as client:
            return client.generate(Prompt(tokens=prompt), options).wait()

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(one, prompts))


class Waiter:
    """A Verify stream with so large a session that the KV cache holds one of them."""

    def __init__(self, channel: grpc.Channel, name: str) -> None:
        self._requests: queue.SimpleQueue[verify_pb2.VerifyRequest | None] = queue.SimpleQueue()
        opening = verify_pb2.VerifyOpen(session_id=name, token_ids=[1, 2, 3], max_position=100)
        self._requests.put(verify_pb2.VerifyRequest(open=opening))
        self.call = verify_pb2_grpc.VerifyServiceStub(channel).Verify(
            iter(self._requests.get, None), timeout=30
        )
        self.responses: Iterator[verify_pb2.VerifyResponse] = iter(self.call)

    def propose(self, position: int, *tokens: int) -> None:
        proposals = verify_pb2.VerifyProposals(position=position, token_ids=tokens)
        self._requests.put(verify_pb2.VerifyRequest(proposals=proposals))

    def cancel(self) -> None:
        self._requests.put(None)
        self.call.cancel()  # type: ignore[no-untyped-call]

    def refused(self) -> str:
        with pytest.raises(grpc.RpcError) as caught:
            next(self.responses)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        return str(caught.value.details())


@pytest.fixture(scope="module")
def batched(start_for_all: Starter) -> Trio:
    """Services with passes for eight sessions."""
    return start_trio(start_for_all, f"{MODEL},batch=8", f"{DRAFT},batch=8")


@pytest.fixture(scope="module")
def short_draft(start_for_all: Starter) -> Trio:
    """Services of which the draft has memory for two short sessions, or one of 100 tokens."""
    return start_trio(start_for_all, f"{MODEL},batch=4", f"{DRAFT},batch=4,memory=110")


@pytest.fixture(scope="module")
def short_verify(start_for_all: Starter) -> Trio:
    """Services of which verify has memory for two short sessions."""
    return start_trio(start_for_all, f"{MODEL},batch=4,memory=110", f"{DRAFT},batch=4")


@pytest.mark.parametrize("strategy", Strategy)
def test_eight_generations_in_one_batch_write_what_each_writes_alone(
    batched: Trio, strategy: Strategy
) -> None:
    trio = batched
    before = verify_info(trio.verify).cache
    first = 37 * list(Strategy).index(strategy)  # no two strategies share a cached prompt
    system = tuple((first + token) % 300 for token in range(200))
    prompts = [(*system, 400 + number, number) for number in range(8)]
    options = Options(strategy, 40)
    generations = generate(trio, prompts, options)
    for prompt, generation in zip(prompts, generations, strict=True):
        assert generation.tokens == expected_output(MODEL, prompt, 40)
        assert not generation.summary().fallback_reason
    assert becomes_true(lambda: nothing_is_left(trio))
    after = verify_info(trio.verify).cache
    num_cached = after.num_cached_tokens - before.num_cached_tokens
    num_computed = after.num_computed_tokens - before.num_computed_tokens
    assert num_cached > 0.8 * (num_cached + num_computed)
    reused = [generation.summary().num_cached_prompt_tokens for generation in generations]
    assert sum(reused) > 0.8 * sum(map(len, prompts))


def test_shared_time_adds_up_to_no_more_than_the_wall_time(batched: Trio) -> None:
    generations = generate(
        batched, [(number, 7) for number in range(8)], Options(Strategy.AMUSD, 60)
    )
    summaries = [generation.summary() for generation in generations]
    longest = max(summary.wall_seconds for summary in summaries)
    assert sum(summary.verify_busy_seconds for summary in summaries) <= 1.5 * longest
    assert sum(summary.draft_busy_seconds for summary in summaries) <= 1.5 * longest


@pytest.mark.parametrize("strategy", Strategy)
@pytest.mark.parametrize("short_of_memory", ["draft", "verify"])
def test_four_clients_finish_where_only_two_fit(
    request: pytest.FixtureRequest, strategy: Strategy, short_of_memory: str
) -> None:
    """A session that waits for memory neither fails nor blocks the other service."""
    trio: Trio = request.getfixturevalue(f"short_{short_of_memory}")
    prompts: list[tuple[int, ...]] = [(number, 7, 8) for number in range(4)]
    for prompt, generation in zip(
        prompts, generate(trio, prompts, Options(strategy, 50)), strict=True
    ):
        assert generation.tokens == expected_output(MODEL, prompt, 50)
        assert not generation.summary().fallback_reason
    assert becomes_true(lambda: nothing_is_left(trio))


@pytest.mark.parametrize("strategy", [Strategy.SPECULATIVE, Strategy.AMUSD])
def test_a_draft_that_waits_for_memory_is_not_waited_for(
    short_draft: Trio, strategy: Strategy
) -> None:
    trio = short_draft
    opening = draft_pb2.ProposeOpen(
        session_id="holder", token_ids=[1], lookahead=1, max_position=100
    )
    requests: queue.SimpleQueue[draft_pb2.ProposeRequest | None] = queue.SimpleQueue()
    requests.put(draft_pb2.ProposeRequest(open=opening))
    with trio.draft.channel() as channel:
        holder = draft_pb2_grpc.DraftServiceStub(channel).Propose(iter(requests.get, None))
        next(iter(holder))
        [generation] = generate(trio, [(5, 6)], Options(strategy, 40))
        requests.put(None)
        holder.cancel()  # type: ignore[no-untyped-call]
    summary = generation.summary()
    assert generation.tokens == expected_output(MODEL, (5, 6), 40)
    assert (summary.num_drafted, summary.fallback_reason) == (0, "")
    assert summary.wall_seconds < 2.5  # the draft timeout is 3 s
    assert becomes_true(lambda: nothing_is_left(trio))


@pytest.fixture(scope="module")
def small(start_for_all: Starter) -> Service:
    """A verify service with memory for one session, and a waiting queue for one more."""
    service = start_for_all(
        "verify", "--model", f"{MODEL},memory=150", "--max-waiting", "1", "--max-wait", "20"
    )
    service.wait_until_serving()
    return service


def test_a_full_waiting_queue_refuses_with_advice_and_its_session_is_served(small: Service) -> None:
    own = expected_output(MODEL, (1, 2, 3), 4)
    with small.channel() as channel:
        first = Waiter(channel, "first")
        next(first.responses)
        second = Waiter(channel, "second")
        second.propose(3, *own[:3])
        assert becomes_true(lambda: verify_info(small).num_waiting == 1)
        details = Waiter(channel, "third").refused()
        assert "--max-waiting" in details
        assert "\n" not in details
        first.cancel()
        verdict = next(second.responses).verdict
        assert (verdict.num_accepted, verdict.next_token_id) == (3, own[3])
        second.cancel()
    assert becomes_true(lambda: verify_info(small).cache.num_reserved_tokens == 0)


def test_a_waiting_session_that_is_cancelled_leaves_its_place_to_another(small: Service) -> None:
    with small.channel() as channel:
        first = Waiter(channel, "first")
        next(first.responses)
        second = Waiter(channel, "second")
        assert becomes_true(lambda: verify_info(small).num_waiting == 1)
        second.cancel()
        assert becomes_true(lambda: verify_info(small).num_waiting == 0)
        third = Waiter(channel, "third")
        assert becomes_true(lambda: verify_info(small).num_waiting == 1)
        first.cancel()
        assert next(third.responses).verdict.position == 3
        third.cancel()
    assert becomes_true(lambda: verify_info(small).num_sessions == 0)


def test_a_wait_that_takes_too_long_is_refused_with_advice(start: Starter) -> None:
    trio = start_trio(start, f"{MODEL},memory=150", verify_flags=("--max-wait", "0.2"))
    with trio.verify.channel() as channel:
        first = Waiter(channel, "first")
        next(first.responses)
        assert "--max-wait" in Waiter(channel, "second").refused()
        with (
            Client(trio.orchestrator.address, timeout_seconds=20) as client,
            pytest.raises(LimitExceededError, match="--cache-mib"),
        ):
            client.generate(Prompt(tokens=(1,)), Options(max_tokens=100)).wait()
        first.cancel()
    assert becomes_true(lambda: nothing_is_left(trio))


def test_the_flags_of_an_engine_reach_it(start: Starter) -> None:
    service = start(
        "verify", "--model", MODEL, "--no-reuse-prefixes", "--max-batch", "4", "--cache-mib", "64",
        "--numerics", "exact", "--weights", "plain", "--max-waiting", "3",
    )  # fmt: skip
    service.wait_until_serving()
    info = verify_info(service)
    assert (info.model.numerics, info.model.weight_format) == ("exact", "plain")
    assert info.limits.max_waiting == 3


@pytest.mark.parametrize(
    "flags", [("--numerics", "sloppy"), ("--weights", "int4"), ("--max-waiting", "-1")]
)
def test_an_invalid_flag_is_refused(flags: tuple[str, str]) -> None:
    result = amusd("serve", "verify", "--model", MODEL, *flags)
    assert result.returncode == 2
    assert flags[0] in result.stderr
