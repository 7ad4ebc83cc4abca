"""A prompt over the limit of a service is refused before its tokens are copied."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pytest

from amusd.fleet.model_description import ServiceLimits
from amusd.observe.observer import Observer
from amusd.protocol.errors import AmusdError, InvalidInputError, UnavailableError
from amusd.rpc.faults import Context
from amusd.serving.session_stream import SessionStreams, StreamShape
from amusd.v1 import draft_pb2 as pb

LIMITS = ServiceLimits(max_sessions=4, max_context=100, max_lookahead=4)


class CopiedError(Exception):
    """The tokens were copied."""


def copy(_: object) -> NoReturn:
    raise CopiedError


def streams(worker: object = None, error: AmusdError | None = None) -> SessionStreams[Any, Any]:
    """Return streams of an engine thread that is ready, has failed, or loads its model."""
    ready: Future[object] = Future()
    if worker is not None:
        ready.set_result(worker)
    if error is not None:
        ready.set_exception(error)
    nothing: Callable[..., Any] = lambda *_: None  # noqa: E731
    shape: StreamShape[Any, Any] = StreamShape(
        "Propose", "advance", copy, nothing, nothing, nothing
    )
    engine: Any = SimpleNamespace(ready=ready)
    return SessionStreams(shape, engine, 1.0, Observer("draft"))


def serve(served: SessionStreams[Any, Any], num_tokens: int) -> None:
    async def requests() -> AsyncIterator[pb.ProposeRequest]:
        yield pb.ProposeRequest(open=pb.ProposeOpen(session_id="a", token_ids=[1] * num_tokens))

    context = cast(Context, SimpleNamespace(invocation_metadata=tuple, peer=str))
    asyncio.run(served.serve(requests(), context))


def test_a_prompt_over_the_limit_is_refused_before_it_is_copied() -> None:
    served = streams(SimpleNamespace(limits=LIMITS))
    with pytest.raises(InvalidInputError, match="101 tokens, the service takes up to 100"):
        serve(served, 101)
    with pytest.raises(CopiedError):
        serve(served, 100)


@pytest.mark.parametrize("error", [None, UnavailableError("no model")])
def test_without_a_model_the_engine_thread_decides(error: AmusdError | None) -> None:
    with pytest.raises(CopiedError):
        serve(streams(error=error), 101)
