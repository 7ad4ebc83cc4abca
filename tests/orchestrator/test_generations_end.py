"""A generation ends with its client's interest, and what the client sees of it until then."""

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import Callable

import pytest
from tokenizers import pre_tokenizers

from amusd.client import Client, Generation, Options, Piece
from amusd.prompts import Prompt
from amusd.protocol.errors import UnavailableError
from orchestrator.text import ModelText
from tests.orchestrator.replicas import becomes_true, written
from tests.orchestrator.running_backends import Serve
from tests.orchestrator.served_orchestrator import CountingVerify, served_orchestrator
from tests.orchestrator.small_tokenizers import SPECIAL, llama

PROMPT = [4, 5]
NUM_TOKENS = 60
NUM_FREE = 4  # then the verify service waits for the test
Kept = list[object]
"""What a client keeps, so that nothing ends because it is collected."""


def started(client: Client) -> Generation:
    return client.generate(Prompt(tokens=tuple(PROMPT)), Options(max_tokens=NUM_TOKENS))


def break_the_loop(generation: Generation, kept: Kept) -> None:
    for _ in generation:
        break


def return_from_the_loop(generation: Generation, kept: Kept) -> None:
    def first() -> Piece:
        for piece in generation:
            return piece
        raise AssertionError("the output is empty")

    assert first().tokens


def raise_in_the_loop(generation: Generation, kept: Kept) -> None:
    try:
        for _ in generation:
            raise KeyError
    except KeyError as error:
        kept.append(error)  # its traceback refers to the frame


def interrupt_the_loop(generation: Generation, kept: Kept) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        for _ in generation:
            raise KeyboardInterrupt


def leave_a_with_block(generation: Generation, kept: Kept) -> None:
    with generation:
        kept.append(pieces := iter(generation))
        next(pieces)


def leave_a_with_block_unread(generation: Generation, kept: Kept) -> None:
    with generation:
        pass


def close_it(generation: Generation, kept: Kept) -> None:
    kept.append(pieces := iter(generation))
    next(pieces)
    generation.close()
    assert list(pieces) == []
    generation.close()


def close_it_while_another_thread_reads(generation: Generation, kept: Kept) -> None:
    reader = threading.Thread(target=generation.wait)
    reader.start()
    while len(generation.tokens) < NUM_FREE:
        time.sleep(0.001)
    generation.close()
    reader.join(10)
    assert not reader.is_alive()


def forget_it_unread(generation: Generation, kept: Kept) -> None:
    kept.clear()


def forget_it_while_it_is_read(generation: Generation, kept: Kept) -> None:
    kept.clear()
    next(iter(generation))


def forget_it_in_a_cycle(generation: Generation, kept: Kept) -> None:
    kept.clear()
    cycle: Kept = [generation]
    cycle.append(cycle)


@pytest.mark.parametrize(
    "leave",
    [
        break_the_loop,
        return_from_the_loop,
        raise_in_the_loop,
        interrupt_the_loop,
        leave_a_with_block,
        leave_a_with_block_unread,
        close_it,
        close_it_while_another_thread_reads,
        forget_it_unread,
        forget_it_while_it_is_read,
        forget_it_in_a_cycle,
    ],
)
async def test_a_generation_that_its_client_leaves_ends(
    serve: Serve, leave: Callable[[Generation, Kept], None]
) -> None:
    verify = CountingVerify(num_free_passes=NUM_FREE)
    async with served_orchestrator(serve, verify) as address:
        with Client(address) as client:
            stays, kept = started(client), Kept([started(client)])
            await becomes_true(lambda: verify.num_open == 2)
            await asyncio.to_thread(lambda: leave(kept[0], kept))  # type: ignore[arg-type]
            gc.collect()
            await becomes_true(lambda: verify.num_open == 1)
            # The other generation of this client goes on.
            verify.may_go_on.set()
            await asyncio.to_thread(stays.wait)
            assert stays.tokens == written(PROMPT, NUM_TOKENS)


async def test_a_client_that_is_closed_ends_its_generations(serve: Serve) -> None:
    verify = CountingVerify(num_free_passes=NUM_FREE)
    async with served_orchestrator(serve, verify) as address:
        client = Client(address)
        read, unread = iter(started(client)), started(client)
        await asyncio.to_thread(next, read)
        await becomes_true(lambda: verify.num_open == 2)
        client.close()
        await becomes_true(lambda: verify.num_open == 0)
        for one in (read, unread):
            with pytest.raises(UnavailableError, match="closed"):
                await asyncio.to_thread(list, one)


async def test_a_generation_goes_on_without_its_client_object(serve: Serve) -> None:
    verify = CountingVerify()
    async with served_orchestrator(serve, verify) as address:
        generation = await asyncio.to_thread(lambda: started(Client(address)))
        gc.collect()
        await asyncio.to_thread(generation.wait)
        assert generation.tokens == written(PROMPT, NUM_TOKENS)


async def test_tokens_without_text_reach_the_loop(serve: Serve) -> None:
    verify = CountingVerify(num_free_passes=NUM_FREE)
    async with served_orchestrator(serve, verify) as address:
        with Client(address) as client:
            pieces = iter(await asyncio.to_thread(started, client))
            seen: list[int] = []
            while len(seen) < NUM_FREE:
                piece = await asyncio.to_thread(next, pieces)
                assert piece == ""
                seen.extend(piece.tokens)
            assert seen == written(PROMPT, NUM_FREE)


async def test_the_output_of_a_raw_prompt_keeps_its_first_space(serve: Serve) -> None:
    tokenizer = llama((*SPECIAL, *(f"▁w{number}" for number in range(47))))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.model.ignore_merges = True
    text = ModelText(tokenizer, "{% for message in messages %}▁w1 ▁w2{% endfor %}", {})
    async with served_orchestrator(serve, CountingVerify(), text) as address:
        with Client(address) as client:

            def output(prompt: Prompt) -> Generation:
                return client.generate(prompt, Options(max_tokens=12)).wait()

            ids = (4, 5)  # of w1 and w2
            prompts = (Prompt(text="▁w1 ▁w2"), Prompt(tokens=ids), Prompt.chat("x"))
            raw, tokens, chat = [await asyncio.to_thread(output, one) for one in prompts]
    assert raw.tokens == tokens.tokens == chat.tokens
    whole = tokenizer.decode([*ids, *raw.tokens])
    assert raw.text == tokens.text == whole.removeprefix("w1 w2")
    assert raw.text.startswith(" ")
    assert chat.text == tokenizer.decode(chat.tokens) == raw.text[1:]
