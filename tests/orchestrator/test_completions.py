"""Outputs of requests at the orchestrator's door: stop texts, and several completions."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import pytest

from amusd.protocol.errors import InvalidInputError, LimitExceededError
from amusd.protocol.finish import FinishRule
from amusd.protocol.strategy import Strategy
from amusd.rpc.faults import Context
from amusd.sampling.parameters import LogprobsOptions, SamplingParameters, SequenceSampling
from amusd.v1 import orchestrator_pb2, orchestrator_pb2_grpc, verify_pb2
from orchestrator.admission import Admission
from orchestrator.completions import plan_of_completion
from orchestrator.session_plan import SessionPlan
from orchestrator.text import ByteText, TextCodec
from tests.orchestrator.replicas import becomes_true, written
from tests.orchestrator.running_backends import Serve, running
from tests.orchestrator.served_orchestrator import CountingVerify, served_orchestrator

PROMPT = [4, 5]
NUM_TOKENS = 30
Stub = orchestrator_pb2_grpc.OrchestratorServiceStub


@dataclass
class Received:
    """What a client gets of one completion."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    end: orchestrator_pb2.Completion | None = None


@asynccontextmanager
async def orchestrator_stub(
    serve: Serve, verify: CountingVerify, text: TextCodec | None = None
) -> AsyncIterator[Stub]:
    async with (
        served_orchestrator(serve, verify, text) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        yield Stub(channel)


def request(**fields: object) -> orchestrator_pb2.GenerateRequest:
    made = orchestrator_pb2.GenerateRequest(max_tokens=NUM_TOKENS, **fields)  # type: ignore[arg-type]
    made.tokens.ids.extend(PROMPT)
    return made


async def received(stub: Stub, asked: orchestrator_pb2.GenerateRequest) -> dict[int, Received]:
    """Return all completions by their index; nothing follows the completion of an output."""
    found: dict[int, Received] = {}
    async for response in stub.Generate(asked):  # type: ignore[attr-defined]
        part = response.chunk if response.HasField("chunk") else response.completion
        one = found.setdefault(part.index, Received())
        assert one.end is None
        one.text += part.text
        if response.HasField("chunk"):
            assert part.token_ids
            one.tokens += part.token_ids
        else:
            one.end = part
    return found


async def status_of(stub: Stub, asked: orchestrator_pb2.GenerateRequest) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await received(stub, asked)
    return refused.value.code().name, refused.value.details() or ""


# Stop texts


@pytest.mark.parametrize("includes_stop", [False, True])
async def test_a_stop_text_ends_the_output_and_its_session(
    serve: Serve, includes_stop: bool
) -> None:
    expected = written(PROMPT, NUM_TOKENS)
    stop = bytes(expected[10:13]).decode()
    end = bytes(expected).decode().find(stop) + 3
    verify = CountingVerify()
    async with orchestrator_stub(serve, verify, ByteText()) as stub:
        asked = request(stop=["never", stop], include_stop=includes_stop)
        found = (await received(stub, asked))[0]
        await becomes_true(lambda: verify.num_open == 0)
    assert found.tokens == expected[:end]
    assert found.text == bytes(expected[: end if includes_stop else end - 3]).decode()
    assert found.end is not None
    assert found.end.finish_reason == orchestrator_pb2.FINISH_REASON_STOP
    assert (found.end.stop_text, found.end.HasField("stop_token_id")) == (stop, False)
    assert found.end.statistics.num_output_tokens == len(found.tokens)


async def test_a_stop_token_is_named_and_a_full_output_has_no_cause(serve: Serve) -> None:
    expected = written(PROMPT, NUM_TOKENS)
    async with orchestrator_stub(serve, CountingVerify()) as stub:
        stopped = (await received(stub, request(stop_token_ids=[expected[7]])))[0]
        full = (await received(stub, request()))[0]
    assert stopped.end is not None
    assert full.end is not None
    assert stopped.end.stop_token_id == expected[7] == stopped.tokens[-1]
    assert full.end.finish_reason == orchestrator_pb2.FINISH_REASON_LENGTH
    assert not full.end.HasField("stop_token_id")
    assert full.end.stop_text == ""


@pytest.mark.parametrize(
    ("fields", "status", "details"),
    [
        ({"stop": [""]}, "INVALID_ARGUMENT", "a text of stop has 0 bytes"),
        ({"stop": ["a"] * 17}, "INVALID_ARGUMENT", "stop has 17 texts"),
        ({"stop": ["a"]}, "UNIMPLEMENTED", "no tokenizer: use stop_token_ids"),
        ({"num_completions": 17}, "INVALID_ARGUMENT", "num_completions is 17: ask for 1 to 16"),
        ({"num_completions": 9}, "INVALID_ARGUMENT", "num_completions is 9: at most 8 sessions"),
    ],
)
async def test_what_cannot_be_served_is_refused(
    serve: Serve, fields: dict[str, object], status: str, details: str
) -> None:
    async with orchestrator_stub(serve, CountingVerify()) as stub:
        found = await status_of(stub, request(**fields))
        assert found[0] == status
        assert details in found[1]
        assert await received(stub, request())  # the next request is served


# Several completions


async def test_each_completion_has_chunks_and_an_end_of_its_own(serve: Serve) -> None:
    async with orchestrator_stub(serve, CountingVerify()) as stub:
        found = await received(stub, request(num_completions=4))
    ends = [found[index].end for index in range(4)]
    assert len({end.session_id for end in ends if end is not None}) == 4
    for one in found.values():
        assert one.tokens == written(PROMPT, NUM_TOKENS)
        assert one.end is not None
        assert one.end.statistics.num_output_tokens == NUM_TOKENS
        assert one.end.finish_reason == orchestrator_pb2.FINISH_REASON_LENGTH


async def test_the_others_open_when_the_first_one_has_computed_the_prompt(serve: Serve) -> None:
    verify = CountingVerify(num_free_passes=0)
    async with orchestrator_stub(serve, verify) as stub:
        call = asyncio.create_task(received(stub, request(num_completions=3)))
        await becomes_true(lambda: verify.num_open == 1)
        await asyncio.sleep(0.05)  # nothing signals that nothing happens
        assert verify.num_open == 1
        verify.may_go_on.set()
        assert len(await call) == 3
    assert len(verify.opened) == 3


async def test_completions_share_a_verify_replica_while_it_has_room(serve: Serve) -> None:
    replicas = [CountingVerify(), CountingVerify()]
    addresses = [await serve(replica) for replica in replicas]
    async with running(",".join(addresses)) as backends:
        await becomes_true(lambda: len(backends.verify.usable) == 2)
        first = backends.verify.take()
        others = [backends.verify.take((), first.address) for _ in range(8)]
        assert [one.address == first.address for one in others] == [True] * 7 + [False]
        assert backends.verify.take([first.address], first.address).address != first.address
        assert backends.verify.take((), "gone:1").address in addresses


class HoldsTwo(CountingVerify):
    """Refuses a session while two are open."""

    async def Verify(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[verify_pb2.VerifyRequest], context: Context
    ) -> None:
        if self.num_open == 2:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no memory")
        await super().Verify(request_iterator, context)


async def test_one_that_fails_ends_all(serve: Serve) -> None:
    verify = HoldsTwo(num_free_passes=5)
    async with orchestrator_stub(serve, verify) as stub:
        status, details = await status_of(stub, request(num_completions=3))
        assert (status, "no memory" in details) == ("RESOURCE_EXHAUSTED", True)
        await becomes_true(lambda: verify.num_open == 0)


@pytest.mark.parametrize("num_free_passes", [0, 5])
async def test_a_client_that_leaves_ends_all(serve: Serve, num_free_passes: int) -> None:
    verify = CountingVerify(num_free_passes=num_free_passes)
    async with orchestrator_stub(serve, verify) as stub:
        call: Any = stub.Generate(request(num_completions=3))
        num_sessions = 3 if num_free_passes else 1
        await becomes_true(lambda: verify.num_open == num_sessions)
        call.cancel()
        await becomes_true(lambda: verify.num_open == 0)


# Sessions that may be open


def test_sessions_are_counted_up_to_the_limit_and_given_back() -> None:
    admission = Admission(5)
    with admission.admitted(3, 8) as seats:
        with pytest.raises(LimitExceededError, match="3 of 5 generations are running"):
            admission.admitted(3, 8).__enter__()
        seats.give_back()
        with admission.admitted(3, 8), pytest.raises(LimitExceededError):
            admission.admitted(1, 8).__enter__()
    with admission.admitted(5, 8):
        pass


@pytest.mark.parametrize("most", [4, 8])
def test_sessions_that_never_fit_are_refused_for_good(most: int) -> None:
    with pytest.raises(InvalidInputError, match=f"at most {min(most, 5)} sessions"):
        Admission(5).admitted(6, most).__enter__()


# Seeds


@pytest.mark.parametrize(("index", "seed"), [(1, 2**64 - 1), (2, 0), (3, 1)])
def test_completions_have_consecutive_seeds(index: int, seed: int) -> None:
    sampling = SequenceSampling(
        SamplingParameters(temperature=1.0, seed=2**64 - 2),
        min_position=7,
        logprobs=LogprobsOptions(3, has_prompt=True),
    )
    plan = SessionPlan(
        "first", (1,), Strategy.AMUSD, 1, FinishRule(1, frozenset()), 1.0, 1.0, sampling=sampling
    )
    other = plan_of_completion(plan, index, "host:1")
    assert other.sampling.parameters == SamplingParameters(temperature=1.0, seed=seed)
    assert (other.sampling.min_position, other.preferred_verify) == (7, "host:1")
    assert other.sampling.logprobs == LogprobsOptions(3)  # the prompt's come once
    assert other.session_id != plan.session_id


# Log-probabilities


@pytest.mark.parametrize("num_completions", [1, 3])
async def test_chunks_have_the_logprobs_and_bytes_of_their_tokens(
    serve: Serve, num_completions: int
) -> None:
    asked = request(num_completions=num_completions, logprobs={"has_prompt": True})
    found: list[orchestrator_pb2.Chunk] = []
    async with orchestrator_stub(serve, CountingVerify(), ByteText()) as stub:
        async for response in stub.Generate(asked):  # type: ignore[attr-defined]
            found += [response.chunk] if response.HasField("chunk") else []
    for chunk in found:
        tokens = [position.token for position in chunk.logprobs]
        assert [token.token_id for token in tokens] == list(chunk.token_ids)
        assert b"".join(token.text for token in tokens).decode() == chunk.text
    for index in range(num_completions):
        chunks = [chunk for chunk in found if chunk.index == index]
        logprobs = [one.token.logprob for chunk in chunks for one in chunk.logprobs]
        assert logprobs == [-float(number) for number in range(2, 2 + NUM_TOKENS)]
        prompts = [
            (place.token.token_id, place.token.logprob, place.token.text)
            for chunk in chunks
            for place in chunk.prompt_logprobs
        ]
        assert prompts == ([(5, -1.0, b"\x05")] if index == 0 else [])
