"""Prompts are tokenized beside the event loop, and refused early where that is possible."""

import asyncio
import threading
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from amusd.observe.observer import Observer
from amusd.protocol.errors import InvalidInputError
from amusd.v1 import orchestrator_pb2 as pb
from orchestrator.backends import Backends
from orchestrator.chat import Message
from orchestrator.orchestrator_servicer import OrchestratorServicer
from orchestrator.orchestrator_settings import OrchestratorSettings
from orchestrator.text import ByteText
from tests.orchestrator.replicas import LIMITS, MODEL

CHAT = pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")])
SERVED = cast(Backends, SimpleNamespace(verify_model=MODEL, limits=LIMITS))


class SlowText(ByteText):
    """A tokenizer that takes until it is let go; it remembers its thread and its limit."""

    def __init__(self) -> None:
        self.started, self.may_end = threading.Event(), threading.Event()
        self.thread: threading.Thread | None = None
        self.limit: int | None = None

    def encode(self, text: str, max_tokens: int | None = None) -> list[int]:
        self.thread, self.limit = threading.current_thread(), max_tokens
        self.started.set()
        assert self.may_end.wait(30)
        return [1, 2]

    def encode_chat(
        self,
        messages: Sequence[Message],
        arguments: Mapping[str, Any] = {},
        parse_special_tokens: bool = False,
        max_tokens: int | None = None,
    ) -> list[int]:
        return self.encode("", max_tokens)


def servicer_of(text: ByteText) -> OrchestratorServicer:
    settings = OrchestratorSettings(draft="")
    servicer = OrchestratorServicer(settings, Observer("orchestrator"))
    servicer.open(SERVED, text)
    return servicer


@pytest.mark.parametrize("request_", [pb.GenerateRequest(text="Hi"), pb.GenerateRequest(chat=CHAT)])
async def test_the_loop_goes_on_while_a_prompt_is_tokenized(request_: pb.GenerateRequest) -> None:
    text = SlowText()
    servicer = servicer_of(text)
    plan = asyncio.create_task(servicer._plan(request_, SERVED))
    assert await asyncio.to_thread(text.started.wait, 30)
    assert not plan.done()
    text.may_end.set()
    assert (await plan).tokens == (1, 2)
    assert text.thread is not threading.main_thread()
    assert text.limit == LIMITS.max_context
    servicer.close()


async def test_a_client_that_leaves_while_its_prompt_is_tokenized_is_gone_at_once() -> None:
    text = SlowText()
    servicer = servicer_of(text)
    plan = asyncio.create_task(servicer._plan(pb.GenerateRequest(text="Hi"), SERVED))
    assert await asyncio.to_thread(text.started.wait, 30)
    plan.cancel()
    with pytest.raises(asyncio.CancelledError):
        await plan
    assert not text.may_end.is_set()
    text.may_end.set()
    servicer.close()


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (pb.GenerateRequest(text="a" * 101), "101 bytes.*context of 100 tokens"),
        (
            pb.GenerateRequest(chat=pb.Chat(messages=list(CHAT.messages) * 101)),
            "101 messages, the context 100",
        ),
        (pb.GenerateRequest(tokens=pb.TokenIds(ids=[7] * 100)), "100 tokens, the context 100"),
        (
            pb.GenerateRequest(tokens=pb.TokenIds(ids=[7]), stop_token_ids=[1] * 51),
            "51 stop_token_ids for a vocabulary of 50",
        ),
    ],
)
async def test_what_cannot_fit_is_refused(request_: pb.GenerateRequest, words: str) -> None:
    servicer = servicer_of(ByteText())
    with pytest.raises(InvalidInputError, match=words):
        await servicer._plan(request_, SERVED)
    servicer.close()


async def test_as_many_stop_tokens_as_there_are_tokens_are_taken() -> None:
    request = pb.GenerateRequest(tokens=pb.TokenIds(ids=[7]), stop_token_ids=range(50))
    servicer = servicer_of(ByteText())
    assert len((await servicer._plan(request, SERVED)).finish.stop_token_ids) == 50
    servicer.close()
