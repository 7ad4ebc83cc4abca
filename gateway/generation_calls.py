"""Runs the calls of one request: one after the other for one prompt, several at a time for more."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator, Sequence

import grpc

from amusd.v1 import orchestrator_pb2
from gateway.api_errors import of_call, unavailable
from gateway.orchestrator_client import OrchestratorClient

Numbered = tuple[int, orchestrator_pb2.GenerateResponse]
"""A message, and the number of the prompt that it answers."""

_MAX_WAITING = 64


def responses(
    orchestrator: OrchestratorClient,
    requests: Sequence[orchestrator_pb2.GenerateRequest],
    concurrency: int,
) -> AsyncGenerator[Numbered, None]:
    """Return the messages of all requests as they come; ``concurrency`` run at a time.

    Every call ends with the returned generator: close it. The first error ends all calls.

    Raises:
        ApiError: a call failed; the generator raises it.
    """
    if len(requests) == 1:
        return _one(orchestrator, 0, requests[0])
    return _merged(orchestrator, requests, concurrency)


async def _one(
    orchestrator: OrchestratorClient, number: int, request: orchestrator_pb2.GenerateRequest
) -> AsyncGenerator[Numbered, None]:
    call = orchestrator.generate(request)
    has_completion = False
    try:
        async for response in call:
            has_completion = response.HasField("completion")
            yield number, response
    except grpc.RpcError as error:
        raise of_call(error) from error
    finally:
        call.cancel()
    if not has_completion:
        raise unavailable("the orchestrator ended the output without a completion: try again")


async def _merged(
    orchestrator: OrchestratorClient,
    requests: Sequence[orchestrator_pb2.GenerateRequest],
    concurrency: int,
) -> AsyncGenerator[Numbered, None]:
    queue: asyncio.Queue[Numbered | None] = asyncio.Queue(_MAX_WAITING)
    producer = asyncio.create_task(_produce(orchestrator, requests, concurrency, queue))
    try:
        while (message := await queue.get()) is not None:
            yield message
        await producer
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    finally:
        producer.cancel()
        await asyncio.gather(producer, return_exceptions=True)


async def _produce(
    orchestrator: OrchestratorClient,
    requests: Sequence[orchestrator_pb2.GenerateRequest],
    concurrency: int,
    queue: "asyncio.Queue[Numbered | None]",
) -> None:
    """Put the messages of all requests into ``queue``, then None."""
    numbered = iter(enumerate(requests))
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(requests))):
                group.create_task(_work(orchestrator, numbered, queue))
    finally:
        await queue.put(None)


async def _work(
    orchestrator: OrchestratorClient,
    numbered: Iterator[tuple[int, orchestrator_pb2.GenerateRequest]],
    queue: "asyncio.Queue[Numbered | None]",
) -> None:
    """Run one call after the other, as long as there are requests."""
    for number, request in numbered:
        async with contextlib.aclosing(_one(orchestrator, number, request)) as messages:
            async for message in messages:
                await queue.put(message)
