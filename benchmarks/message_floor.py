"""The floor of a message on this machine: gRPC between two processes, with nothing else to do."""

import asyncio
import contextlib
import multiprocessing
import os
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import grpc
import grpc.aio

from amusd.rpc.channel import SERVER_OPTIONS, open_channel

_METHOD = "/floor.Echo/"
_PAYLOAD = bytes(24)  # about as long as a proposal or a verdict
_NUM_WARM_UP = 100
_NICENESS = 19
_PAUSE_SECONDS = 3e-3  # between the messages of one direction, in a cycle of passes of 8 ms
_MAX_PAUSED = 500

# Children start afresh: gRPC does not survive a fork.
_processes = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True)
class FloorTimes:
    """Seconds of each round trip over an open stream, and of each unary call.

    Before a paused round trip both processes sleep, as services do during a pass. A core that
    sleeps takes time to wake up.
    """

    round_trip_seconds: tuple[float, ...]
    paused_round_trip_seconds: tuple[float, ...]
    unary_seconds: tuple[float, ...]


def measure_floor(num_messages: int) -> FloorTimes:
    """Exchange ``num_messages`` with a process that echoes them, over a stream and by calls."""
    receiver, sender = _processes.Pipe(duplex=False)
    with _running(_processes.Process(target=_serve, args=(sender,), daemon=True)):
        return asyncio.run(_exchange(f"127.0.0.1:{receiver.recv()}", num_messages))


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    """Keep each usable core busy with a process of the lowest priority."""
    with contextlib.ExitStack() as stack:
        for _ in os.sched_getaffinity(0):
            receiver, sender = _processes.Pipe(duplex=False)
            stack.enter_context(
                _running(_processes.Process(target=_burn, args=(sender,), daemon=True))
            )
            receiver.recv()
        yield


@contextlib.contextmanager
def _running(process: BaseProcess) -> Iterator[None]:
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _burn(ready: Connection) -> None:
    os.nice(_NICENESS)
    ready.send(None)
    while True:
        pass


def _serve(ready: Connection) -> None:
    asyncio.run(_echo_server(ready))


async def _echo_server(ready: Connection) -> None:
    async def stream(requests: AsyncIterator[bytes], _: object) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    async def unary(request: bytes, _: object) -> bytes:
        return request

    handlers = {
        "Stream": grpc.stream_stream_rpc_method_handler(stream),
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
    }
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("floor.Echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    ready.send(port)
    await server.wait_for_termination()


async def _exchange(address: str, num_messages: int) -> FloorTimes:
    async with open_channel(address) as channel:
        call = channel.stream_stream(_METHOD + "Stream", None, None)(None)
        trips = [await _round_trip(call) for _ in range(_NUM_WARM_UP + num_messages)]
        paused = [await _paused_round_trip(call) for _ in range(min(num_messages, _MAX_PAUSED))]
        call.cancel()
        unary = channel.unary_unary(_METHOD + "Unary", None, None)
        calls = [await _unary_call(unary) for _ in range(_NUM_WARM_UP + num_messages)]
    return FloorTimes(tuple(trips[_NUM_WARM_UP:]), tuple(paused), tuple(calls[_NUM_WARM_UP:]))


async def _round_trip(call: grpc.aio.StreamStreamCall[bytes, bytes]) -> float:
    started = time.perf_counter()
    await call.write(_PAYLOAD)
    await call.read()
    return time.perf_counter() - started


async def _paused_round_trip(call: grpc.aio.StreamStreamCall[bytes, bytes]) -> float:
    await asyncio.sleep(_PAUSE_SECONDS)
    return await _round_trip(call)


async def _unary_call(unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]) -> float:
    started = time.perf_counter()
    await unary(_PAYLOAD)
    return time.perf_counter() - started
