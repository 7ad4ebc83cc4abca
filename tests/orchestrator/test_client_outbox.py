"""A client's outbox: order, chunks that grow while the client is slow, and its two bounds."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.fleet.model_description import BYTES_TOKENIZER
from amusd.protocol.errors import LimitExceededError
from amusd.sampling.parameters import TokenLogprobs
from orchestrator.client_outbox import ClientOutbox
from orchestrator.completion_output import CompletionOutput, OutputChunk
from orchestrator.emission import Emission
from orchestrator.text import load_text_codec

TIMEOUT_SECONDS = 30.0
MAX_WAITING = 1 << 16
BYTES = load_text_codec(BYTES_TOKENIZER)


class Clock:
    """The time of the running event loop, which a test can turn forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        self._real_time = loop.time
        self._ahead_seconds = 0.0
        monkeypatch.setattr(loop, "time", lambda: self._real_time() + self._ahead_seconds)

    def turn_forward(self, seconds: float) -> None:
        self._ahead_seconds += seconds


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Client:
    """A client that reads chunks, each of them as soon as it ``may_read``."""

    def __init__(self) -> None:
        self.chunks: list[tuple[tuple[int, ...], str]] = []
        self.num_offered = 0
        self.num_cancelled = 0
        self.may_read = asyncio.Event()
        self.may_read.set()

    @property
    def tokens(self) -> list[int]:
        return [token for tokens, _ in self.chunks for token in tokens]

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.chunks)

    async def write(self, chunk: OutputChunk) -> None:
        self.num_offered += 1
        try:
            await self.may_read.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        self.chunks.append((chunk.tokens, chunk.text))

    def outbox(self) -> "Outbox":
        return Outbox(self)


class Outbox(ClientOutbox):
    """The outbox of a client that has one output."""

    def __init__(self, client: Client) -> None:
        self.output = CompletionOutput(0, BYTES.decoder())
        super().__init__([self.output], client.write, TIMEOUT_SECONDS)

    def add(self, tokens: tuple[int, ...]) -> None:
        self.put(self.output, Emission(tokens))


async def take_turns() -> None:
    """Let all that is ready run: timers that are due, and what follows from them."""
    for _ in range(20):
        await asyncio.sleep(0)


async def until_offered(client: Client, num_chunks: int) -> None:
    """Let the writer run until it has offered the client so many chunks."""
    for _ in range(100):
        if client.num_offered == num_chunks:
            return
        await asyncio.sleep(0)
    raise AssertionError(f"{client.num_offered} chunks were offered, not {num_chunks}")


# Order and chunks


async def test_tokens_come_as_they_are_put_while_the_client_keeps_up() -> None:
    client = Client()
    outbox = client.outbox()
    drained = asyncio.create_task(outbox.drain())
    for number, tokens in enumerate([(97,), (98, 99), (100,)], 1):
        outbox.add(tokens)
        await until_offered(client, number)
    outbox.close()
    await drained
    assert client.chunks == [((97,), "a"), ((98, 99), "bc"), ((100,), "d")]


async def test_tokens_that_come_while_a_chunk_is_written_go_into_one_chunk() -> None:
    client = Client()
    client.may_read.clear()
    outbox = client.outbox()
    drained = asyncio.create_task(outbox.drain())
    outbox.add((97,))
    await until_offered(client, 1)
    for token in range(98, 108):
        outbox.add((token,))
    client.may_read.set()
    await until_offered(client, 2)
    outbox.close()
    await drained
    assert client.chunks == [((97,), "a"), (tuple(range(98, 108)), "bcdefghijk")]


async def test_a_close_lets_the_rest_be_written() -> None:
    client = Client()
    outbox = client.outbox()
    outbox.add((97,))
    outbox.add((98,))
    outbox.close()
    await outbox.drain()
    assert client.text == "ab"


async def test_a_close_ends_a_drain_that_waits_for_tokens() -> None:
    client = Client()
    outbox = client.outbox()
    drained = asyncio.create_task(outbox.drain())
    await asyncio.sleep(0)
    outbox.close()
    async with asyncio.timeout(10):
        await drained
    assert client.num_offered == 0


async def test_a_character_is_written_with_its_last_byte() -> None:
    client = Client()
    outbox = client.outbox()
    drained = asyncio.create_task(outbox.drain())
    first, last = "é".encode()
    outbox.add((first,))
    await until_offered(client, 1)
    outbox.add((last, 97))
    outbox.close()
    await drained
    assert client.chunks == [((first,), ""), ((last, 97), "éa")]


@given(
    puts=st.lists(st.lists(st.integers(97, 122), min_size=1, max_size=5), max_size=20),
    turns=st.lists(st.integers(0, 3), min_size=20, max_size=20),
)
def test_all_tokens_come_once_and_in_order_however_slowly_the_client_reads(
    puts: list[list[int]], turns: list[int]
) -> None:
    async def run() -> Client:
        client = Client()
        outbox = client.outbox()
        drained = asyncio.create_task(outbox.drain())
        for number, (tokens, num_turns) in enumerate(zip(puts, turns, strict=False)):
            (client.may_read.set if number % 3 else client.may_read.clear)()
            outbox.add(tuple(tokens))
            for _ in range(num_turns):
                await asyncio.sleep(0)
        client.may_read.set()
        outbox.close()
        await drained
        return client

    client = asyncio.run(run())
    assert client.tokens == [token for tokens in puts for token in tokens]
    assert client.text == bytes(client.tokens).decode()
    assert all(tokens for tokens, _ in client.chunks)


async def test_outputs_take_turns_once_the_prompt_is_written() -> None:
    client = Client()
    outputs = [CompletionOutput(index, BYTES.decoder()) for index in range(3)]
    outbox = ClientOutbox(outputs, client.write, TIMEOUT_SECONDS)
    prompt = tuple(TokenLogprobs(token, -1.0) for token in range(10_000))
    for output, token in zip(outputs, b"abc", strict=True):
        outbox.put(output, Emission((token,) * 1025, (), prompt if token == ord("a") else ()))
    outbox.close()
    await outbox.drain()
    assert [tokens[:1] for tokens, _ in client.chunks[:2]] == [(), ()]
    assert "".join(text[:1] for _, text in client.chunks) == "abcabc"


async def test_the_end_of_an_output_follows_its_tokens_beside_others() -> None:
    client = Client()
    outputs = [CompletionOutput(index, BYTES.decoder()) for index in range(2)]
    outbox = ClientOutbox(outputs, client.write, TIMEOUT_SECONDS)
    drained = asyncio.create_task(outbox.drain())
    outbox.put(outputs[0], Emission((97,)))

    async def write_end() -> None:
        client.chunks.append(((), "end"))

    await outbox.end(outputs[0], write_end)
    assert client.chunks == [((97,), "a"), ((), "end")]
    outbox.put(outputs[1], Emission((98,)))
    outbox.close()
    await drained
    assert client.chunks[2:] == [((98,), "b")]


# Bounds


async def test_a_client_that_does_not_read_in_time_is_given_up_with_advice(clock: Clock) -> None:
    client = Client()
    client.may_read.clear()
    outbox = client.outbox()
    drained = asyncio.create_task(outbox.drain())
    outbox.add((97,))
    await until_offered(client, 1)
    clock.turn_forward(TIMEOUT_SECONDS - 5)
    await take_turns()
    assert not drained.done()
    clock.turn_forward(5)
    with pytest.raises(LimitExceededError, match=r"not read for 30 s.*--client-write-timeout"):
        await drained
    assert (client.chunks, client.num_cancelled) == ([], 1)


async def test_each_chunk_has_the_whole_time(clock: Clock) -> None:
    client = Client()
    outbox = client.outbox()
    drained = asyncio.create_task(outbox.drain())
    for number in range(1, 6):
        client.may_read.clear()
        outbox.add((97,))
        await until_offered(client, number)
        clock.turn_forward(TIMEOUT_SECONDS - 5)
        await take_turns()
        client.may_read.set()
        await take_turns()
        assert len(client.chunks) == number
    outbox.close()
    await drained
    assert client.text == "aaaaa"


async def test_a_generation_without_new_tokens_is_not_timed_out(clock: Clock) -> None:
    client = Client()
    outbox = client.outbox()
    drained = asyncio.create_task(outbox.drain())
    await take_turns()
    clock.turn_forward(100 * TIMEOUT_SECONDS)
    await take_turns()
    outbox.add((97,))
    outbox.close()
    await drained
    assert client.text == "a"


async def test_more_tokens_than_may_wait_are_refused_and_change_nothing() -> None:
    client = Client()
    client.may_read.clear()
    outbox = client.outbox()
    drained = asyncio.create_task(outbox.drain())
    outbox.add((97,))
    await until_offered(client, 1)
    outbox.add((98,) * (MAX_WAITING - 1))
    with pytest.raises(LimitExceededError, match=f"more than {MAX_WAITING} tokens.*read faster"):
        outbox.add((99, 99))
    outbox.add((100,))
    client.may_read.set()
    outbox.close()
    await drained
    sizes = [len(tokens) for tokens, _ in client.chunks]
    assert sizes[:2] == [1, 1024]
    assert max(sizes) == 1024  # a longer one would hold up the event loop while it is decoded
    assert sum(sizes) == 1 + MAX_WAITING
    assert client.tokens[-1] == 100
