"""Both clients against an orchestrator on loopback: pieces, ends, retries, keys and errors."""

import asyncio
import gc
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

import amusd
from amusd import AsyncClient, Client
from amusd.async_client import AsyncGeneration
from amusd.client import Generation, Piece, PositionLogprobs, TokenLogprob
from amusd.protocol.errors import (
    AmusdError,
    InvalidInputError,
    LimitExceededError,
    PreconditionError,
    UnavailableError,
)
from amusd.protocol.finish import FinishReason
from amusd.v1 import sampling_pb2
from tests.clients.fake_orchestrator import (
    FakeOrchestrator,
    chunk,
    completion,
    make_certificate,
    serving,
)

ANSWER = [chunk("Bl", 1, 2), chunk("", 3), chunk("ue", 4), completion(text=".")]

Read = tuple[Generation | AsyncGeneration, list[Piece]]
Reader = Callable[..., Read]
"""Asks at an address and reads to the end; keyword arguments are those of client and options."""

CLIENT_ARGUMENTS = ("tls", "ca", "api_key", "max_attempts", "timeout_seconds")


def read_blocking(address: str, prompt: Any = "Why?", **arguments: Any) -> Read:
    own = {name: arguments.pop(name) for name in CLIENT_ARGUMENTS if name in arguments}
    with Client(address, **own) as client:
        generation = client.chat(prompt, **arguments)
        return generation, list(generation)


def read_async(address: str, prompt: Any = "Why?", **arguments: Any) -> Read:
    own = {name: arguments.pop(name) for name in CLIENT_ARGUMENTS if name in arguments}

    async def read() -> Read:
        async with AsyncClient(address, **own) as client:
            generation = client.chat(prompt, **arguments)
            return generation, [piece async for piece in generation]

    return asyncio.run(read())


both = pytest.mark.parametrize("read", [read_blocking, read_async])


@both
def test_an_answer_is_read_piece_by_piece(read: Reader) -> None:
    fake = FakeOrchestrator(ANSWER)
    with serving(fake) as address:
        generation, pieces = read(address, temperature=0.5)
    assert pieces == ["Bl", "", "ue", "."]
    assert [piece.tokens for piece in pieces] == [(1, 2), (3,), (4,), ()]
    assert generation.text == "Blue."
    assert generation.tokens == [1, 2, 3, 4]
    assert (generation.finish_reason, generation.seed) == (FinishReason.STOP, 7)
    assert generation.statistics is not None
    assert generation.statistics.num_passes == 2
    (request,) = fake.requests
    assert request.chat.messages[0].content == "Why?"
    assert request.sampling.temperature == 0.5


@both
def test_several_completions_are_kept_apart(read: Reader) -> None:
    answer = [
        chunk("a", 1), chunk("b", 2, index=1), chunk("c", 3),
        completion(1, seed=8), completion(0, seed=7),
    ]  # fmt: skip
    with serving(FakeOrchestrator(answer)) as address:
        generation, pieces = read(address, n=2)
    assert [(piece, piece.index) for piece in pieces] == [("a", 0), ("b", 1), ("c", 0)]
    assert [(one.text, one.seed) for one in generation.completions] == [("ac", 7), ("b", 8)]
    assert generation.text == "ac"


@both
def test_a_completion_that_was_not_asked_for_is_an_error(read: Reader) -> None:
    with (
        serving(FakeOrchestrator([chunk("a", 1, index=1)])) as address,
        pytest.raises(UnavailableError, match="completion 1, of 1 asked for"),
    ):
        read(address)


@both
def test_log_probabilities_come_with_their_tokens(read: Reader) -> None:
    euro = sampling_pb2.TokenLogprob(token_id=4, logprob=-0.5, text="€".encode())
    part = sampling_pb2.TokenLogprob(token_id=5, logprob=-1.5, text="€".encode()[:2])
    position = sampling_pb2.PositionLogprobs(token=euro, top=[euro, part])
    response = chunk("€", 4)
    response.chunk.logprobs.append(position)
    response.chunk.prompt_logprobs.append(position)
    with serving(FakeOrchestrator([response, completion()])) as address:
        generation, (piece,) = read(address, logprobs=2)
    one, other = TokenLogprob(4, -0.5, "€".encode()), TokenLogprob(5, -1.5, "€".encode()[:2])
    expected = PositionLogprobs(one, (one, other))
    assert list(piece.logprobs) == generation.logprobs == [expected]
    assert generation.prompt_logprobs == [expected]
    assert (one.text, other.text) == ("€", "\ufffd")


@both
@pytest.mark.parametrize(
    "status", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED]
)
def test_a_call_is_repeated_while_nothing_has_come(read: Reader, status: grpc.StatusCode) -> None:
    fake = FakeOrchestrator(ANSWER, refusals=[status, status])
    with serving(fake) as address:
        generation, _ = read(address)
    assert generation.text == "Blue."
    assert len(fake.requests) == 3


@both
def test_attempts_are_bounded(read: Reader) -> None:
    fake = FakeOrchestrator(ANSWER, refusals=[grpc.StatusCode.RESOURCE_EXHAUSTED] * 9)
    with serving(fake) as address:
        for max_attempts in (1, 2):
            fake.requests.clear()
            with pytest.raises(LimitExceededError, match=f"orchestrator at {address}: not now"):
                read(address, max_attempts=max_attempts)
            assert len(fake.requests) == max_attempts


@both
@pytest.mark.parametrize("status", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL])
def test_what_may_not_help_is_not_repeated(read: Reader, status: grpc.StatusCode) -> None:
    fake = FakeOrchestrator(ANSWER, refusals=[status])
    with serving(fake) as address, pytest.raises(AmusdError, match="not now"):
        read(address)
    assert len(fake.requests) == 1


@both
def test_a_call_that_breaks_off_after_its_first_piece_is_not_repeated(read: Reader) -> None:
    fake = FakeOrchestrator(ANSWER[:1], last_status=grpc.StatusCode.UNAVAILABLE)
    with serving(fake) as address, pytest.raises(UnavailableError, match="broken off"):
        read(address)
    assert len(fake.requests) == 1


@both
def test_a_deadline_bounds_all_attempts_together(read: Reader) -> None:
    fake = FakeOrchestrator(ANSWER, refusals=[grpc.StatusCode.UNAVAILABLE] * 4)
    with serving(fake) as address, pytest.raises(UnavailableError):
        read(address, timeout_seconds=0.05, max_attempts=5)
    assert len(fake.requests) == 1


@both
def test_a_timeout_says_what_to_do(read: Reader) -> None:
    fake = FakeOrchestrator(ANSWER, num_free=1)
    with serving(fake) as address, pytest.raises(UnavailableError, match="raise it, or ask for"):
        read(address, timeout_seconds=0.2)


@both
def test_an_api_key_goes_with_every_call(read: Reader) -> None:
    fake = FakeOrchestrator(ANSWER)
    with serving(fake) as address:
        read(address, api_key="secret")
        with Client(address, api_key="secret") as client:
            assert client.server_info().version == "test"
        read(address)
    keys = [metadata.get("authorization") for metadata in fake.metadata]
    assert keys == ["Bearer secret", "Bearer secret", None]


@both
@pytest.mark.parametrize(("key", "hint"), [("", "set api_key"), ("wrong", "check api_key")])
def test_a_refused_key_is_an_error_that_says_so(read: Reader, key: str, hint: str) -> None:
    fake = FakeOrchestrator(ANSWER, refusals=[grpc.StatusCode.UNAUTHENTICATED])
    with serving(fake) as address, pytest.raises(InvalidInputError, match=hint) as caught:
        read(address, api_key=key)
    assert "wrong" not in str(caught.value)


@both
def test_nothing_at_the_address_is_an_error_that_says_what_to_do(read: Reader) -> None:
    with pytest.raises(UnavailableError, match=r"at 127\.0\.0\.1:9: .*start one with amusd up"):
        read("127.0.0.1:9", timeout_seconds=10)


BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"address": "localhost"}, "no port"),
    ({"max_attempts": 0}, "max_attempts is 0: use 1 to 5"),
    ({"max_attempts": 6}, "max_attempts is 6"),
    ({"api_key": "a\nb"}, "api_key has characters"),
    ({"ca": "/nowhere.pem"}, "cannot read certificates from /nowhere.pem"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
async def test_bad_arguments_of_a_client_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Client(**arguments)
    with pytest.raises(InvalidInputError, match=message):
        AsyncClient(**arguments).chat("x")


async def arrived(fake: FakeOrchestrator) -> None:
    assert await asyncio.to_thread(fake.arrived.wait, 5)


async def leave_the_loop(client: AsyncClient, fake: FakeOrchestrator) -> None:
    async for _ in client.chat("x"):
        break


async def raise_in_the_loop(client: AsyncClient, fake: FakeOrchestrator) -> None:
    async def read() -> None:
        async for _ in client.chat("x"):
            raise KeyError

    with pytest.raises(KeyError):
        await read()


async def leave_the_block(client: AsyncClient, fake: FakeOrchestrator) -> None:
    async with client.chat("x"):
        await arrived(fake)


async def forget_it(client: AsyncClient, fake: FakeOrchestrator) -> None:
    generation = client.chat("x")
    await arrived(fake)
    del generation
    gc.collect()


async def cancel_the_task(client: AsyncClient, fake: FakeOrchestrator) -> None:
    reading, started = asyncio.Event(), client.chat("x")

    async def read() -> None:
        async for _ in started:
            reading.set()

    task = asyncio.create_task(read())
    await reading.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def close_it_while_it_is_read(client: AsyncClient, fake: FakeOrchestrator) -> None:
    generation = client.chat("x")
    async for _ in generation:
        asyncio.get_running_loop().call_soon(generation.close)
    assert generation.tokens == [1, 2]
    assert [piece async for piece in generation] == []


async def close_the_client(client: AsyncClient, fake: FakeOrchestrator) -> None:
    async def read() -> None:
        async for _ in client.chat("x"):
            await client.close()

    with pytest.raises(UnavailableError):
        await read()


@pytest.mark.parametrize(
    "leave",
    [
        leave_the_loop, raise_in_the_loop, leave_the_block, forget_it, cancel_the_task,
        close_it_while_it_is_read, close_the_client,
    ],
)  # fmt: skip
async def test_an_async_generation_that_is_left_ends_at_the_server(
    leave: Callable[[AsyncClient, FakeOrchestrator], Awaitable[None]],
) -> None:
    fake = FakeOrchestrator(ANSWER, num_free=1)
    with serving(fake) as address:
        async with AsyncClient(address) as client:
            await leave(client, fake)
            assert await asyncio.to_thread(fake.ended.wait, 5)


async def test_a_closed_async_client_says_so() -> None:
    client = AsyncClient()
    await client.close()
    with pytest.raises(PreconditionError, match="the client is closed: make a new one"):
        client.chat("x")
    with pytest.raises(PreconditionError, match="the client is closed: make a new one"):
        client.generate("x")
    with pytest.raises(PreconditionError, match="closed"):
        await client.server_info()


async def test_async_generate_and_server_info() -> None:
    fake = FakeOrchestrator(ANSWER)
    with serving(fake) as address:
        async with AsyncClient(address) as client:
            assert (await client.generate([1, 2], max_tokens=3).wait()).text == "Blue."
            assert (await client.server_info()).version == "test"
    assert list(fake.requests[0].tokens.ids) == [1, 2]


def test_the_package_itself_imports_no_grpc() -> None:
    program = "import amusd, sys; assert 'grpc' not in sys.modules; from amusd import Client"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    with pytest.raises(AttributeError, match="no attribute 'Server'"):
        getattr(amusd, "Server")  # noqa: B009


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A key and its own certificate for loopback, as PEM files."""
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@both
def test_tls_needs_a_certificate_that_the_client_trusts(
    read: Reader, certificate: tuple[Path, Path]
) -> None:
    key, chain = (path.read_bytes() for path in certificate)
    with serving(FakeOrchestrator(ANSWER), grpc.ssl_server_credentials([(key, chain)])) as address:
        for ca in (certificate[1], str(certificate[1]), chain):
            assert read(address, ca=ca)[0].text == "Blue."
        with pytest.raises(UnavailableError, match="check tls and ca"):
            read(address, tls=True, max_attempts=1)
        with pytest.raises(UnavailableError):
            read(address, max_attempts=1)
