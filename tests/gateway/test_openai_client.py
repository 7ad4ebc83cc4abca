"""The openai package against a gateway: every answer in the shape that it expects."""

import asyncio
import json
from typing import Any

import grpc
import openai
import pytest

from amusd.v1 import orchestrator_pb2
from tests.gateway.scripted_orchestrator import (
    MODEL,
    Request,
    Response,
    ScriptedOrchestrator,
    becomes_true,
    chunk,
    completion,
    position,
    served_gateway,
)

USER: list[Any] = [{"role": "user", "content": "Hi"}]


async def test_models_are_listed_and_found(client: openai.AsyncOpenAI) -> None:
    listed = await client.models.list()
    assert [one.id for one in listed.data] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError) as refused:
        await client.models.retrieve("other")
    assert refused.value.code == "model_not_found"


async def test_a_chat_is_one_object(
    client: openai.AsyncOpenAI, orchestrator: ScriptedOrchestrator
) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=USER, temperature=0, seed=7)
    (choice,) = answer.choices
    assert choice.message.content == "Hello world"
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == MODEL
    assert answer.system_fingerprint == "amusd-0.1.0-abababababab"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 2)
    (request,) = orchestrator.requests
    assert request.chat.messages[0].content == "Hi"
    assert request.sampling.temperature == 0
    assert request.sampling.seed == 7


async def test_a_streamed_chat_names_the_role_then_says_the_text_then_ends(
    client: openai.AsyncOpenAI,
) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = [one async for one in stream]
    *told, last = chunks
    deltas = [one.choices[0].delta for one in told]
    assert deltas[0].role == "assistant"
    assert [one.content for one in deltas] == ["", "Hello", " world", None]
    assert [one.choices[0].finish_reason for one in told] == [None, None, None, "stop"]
    assert all(one.usage is None for one in told)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == 5
    assert len({one.id for one in chunks}) == 1
    assert all(one.object == "chat.completion.chunk" for one in chunks)
    (metrics,) = (one.model_extra for one in chunks if "metrics" in (one.model_extra or {}))
    assert metrics is not None
    assert metrics["metrics"]["speculative_decoding"]["num_spec_steps"] == 2


async def test_without_usage_the_last_chunk_has_the_speculation_figures(
    client: openai.AsyncOpenAI,
) -> None:
    stream = await client.chat.completions.create(model=MODEL, messages=USER, stream=True)
    chunks = [one async for one in stream]
    assert all(one.usage is None for one in chunks)
    assert ["metrics" in (one.model_extra or {}) for one in chunks] == [False, False, False, True]
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_several_prompts_and_completions_are_numbered_prompt_by_prompt(
    client: openai.AsyncOpenAI, orchestrator: ScriptedOrchestrator
) -> None:
    def script(request: Request) -> list[Response]:
        return [
            chunk(f"{request.text}0", index=0),
            chunk(f"{request.text}1", index=1),
            completion(1),
            completion(0),
        ]

    orchestrator.script = script
    prompts = list("abcdefg")
    answer = await client.completions.create(model=MODEL, prompt=prompts, n=2, max_tokens=5)
    expected = [f"{one}{number}" for one in prompts for number in (0, 1)]
    assert [one.text for one in answer.choices] == expected
    assert [one.index for one in answer.choices] == list(range(14))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3 * 7
    assert answer.usage.completion_tokens == 2 * 14
    assert orchestrator.most_open <= 4
    assert "metrics" not in (answer.model_extra or {})

    texts = [""] * 14
    stream = await client.completions.create(model=MODEL, prompt=prompts, n=2, stream=True)
    async for one in stream:
        texts[one.choices[0].index] += one.choices[0].text
    assert texts == expected


async def test_log_probabilities_of_a_chat(
    client: openai.AsyncOpenAI, orchestrator: ScriptedOrchestrator
) -> None:
    half = "é".encode()[:1]
    told = [position(b"Hi", -0.5, (b"Hi", -0.5), (half, float("-inf")))]
    orchestrator.script = lambda request: [chunk("Hi", logprobs=told), completion()]
    for stream in (False, True):
        answer: Any = await client.chat.completions.create(
            model=MODEL, messages=USER, logprobs=True, top_logprobs=2, stream=stream
        )
        if stream:
            with_logprobs = [
                one.choices[0].logprobs async for one in answer if one.choices[0].logprobs
            ]
            (logprobs,) = with_logprobs
        else:
            logprobs = answer.choices[0].logprobs
        (token,) = logprobs.content
        assert (token.token, token.logprob, token.bytes) == ("Hi", -0.5, [72, 105])
        assert [one.token for one in token.top_logprobs] == ["Hi", "\ufffd"]
        assert token.top_logprobs[1].bytes == list(half)
        assert token.top_logprobs[1].logprob == -9999.0
    assert orchestrator.requests[0].logprobs.num_top == 2


async def test_an_echo_repeats_the_prompt_with_its_log_probabilities(
    client: openai.AsyncOpenAI, orchestrator: ScriptedOrchestrator
) -> None:
    of_prompt = [position(b" cat", -1.0, (b" cat", -1.0), (b" dog", -2.0))]
    of_output = [position(b" sat", -0.25, (b" ran", -0.125))]
    orchestrator.script = lambda request: [
        chunk(" sat", logprobs=of_output, prompt_logprobs=of_prompt),
        completion(reason=orchestrator_pb2.FINISH_REASON_LENGTH),
    ]
    for prompt, first in (("A cat", "A"), ([5, 6], "")):
        for stream in (False, True):
            answer: Any = await client.completions.create(
                model=MODEL, prompt=prompt, echo=True, logprobs=1, max_tokens=1, stream=stream
            )
            choice = (await anext(aiter(answer)) if stream else answer).choices[0]
            assert choice.text == f"{first} cat sat"
            assert choice.logprobs.tokens == [first, " cat", " sat"]
            assert choice.logprobs.token_logprobs == [None, -1.0, -0.25]
            assert choice.logprobs.text_offset == [0, len(first), len(first) + 4]
            assert choice.logprobs.top_logprobs == [
                None,
                {" cat": -1.0, " dog": -2.0},
                {" ran": -0.125, " sat": -0.25},
            ]
            if stream:
                await answer.close()
    assert orchestrator.requests[0].logprobs.has_prompt


async def test_an_echo_of_no_tokens_is_the_prompt_alone(
    client: openai.AsyncOpenAI, orchestrator: ScriptedOrchestrator
) -> None:
    answer = await client.completions.create(model=MODEL, prompt="A cat", echo=True, max_tokens=0)
    assert answer.choices[0].text == "A cat"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    assert orchestrator.requests[0].max_tokens == 1


async def test_a_json_schema_becomes_a_constraint(
    client: openai.AsyncOpenAI, orchestrator: ScriptedOrchestrator
) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    await client.chat.completions.create(model=MODEL, messages=USER, response_format=wanted)
    assert json.loads(orchestrator.requests[0].sampling.constraint.json_schema) == schema


async def test_the_end_of_an_output_says_what_stopped_it_and_its_seed(
    client: openai.AsyncOpenAI, orchestrator: ScriptedOrchestrator
) -> None:
    seed = 2**64 - 3
    orchestrator.script = lambda request: [chunk("a"), completion(stop_text="END", seed=seed)]
    answer = await client.completions.create(model=MODEL, prompt="x", stop="END")
    assert answer.choices[0].model_extra is not None
    assert answer.choices[0].model_extra["stop_reason"] == "END"
    assert answer.choices[0].model_extra["seed"] == seed
    assert list(orchestrator.requests[0].stop) == ["END"]

    for named, reason in (([9], 9), ([], None)):
        orchestrator.script = lambda request: [chunk("a"), completion(stop_token_id=9)]
        answer = await client.completions.create(
            model=MODEL, prompt="x", extra_body={"stop_token_ids": named}
        )
        assert answer.choices[0].model_extra is not None
        assert answer.choices[0].model_extra["stop_reason"] == reason


@pytest.mark.parametrize(
    ("status", "http"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 400),
        (grpc.StatusCode.OUT_OF_RANGE, 400),
        (grpc.StatusCode.FAILED_PRECONDITION, 400),
        (grpc.StatusCode.NOT_FOUND, 404),
        (grpc.StatusCode.ALREADY_EXISTS, 409),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
        (grpc.StatusCode.INTERNAL, 500),
        (grpc.StatusCode.UNKNOWN, 500),
        (grpc.StatusCode.UNIMPLEMENTED, 501),
        (grpc.StatusCode.UNAVAILABLE, 503),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 504),
    ],
)
async def test_each_grpc_status_has_its_http_status(
    client: openai.AsyncOpenAI,
    orchestrator: ScriptedOrchestrator,
    status: grpc.StatusCode,
    http: int,
) -> None:
    orchestrator.script = lambda request: ()
    orchestrator.status, orchestrator.details = status, "max_tokens is 9: use less"
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as refused:
            await client.chat.completions.create(model=MODEL, messages=USER, stream=stream)
        assert refused.value.status_code == http
        assert refused.value.param == ("max_tokens" if http == 400 else None)
        assert "max_tokens is 9: use less" in refused.value.message


async def test_an_error_in_a_stream_ends_it_as_an_error(
    client: openai.AsyncOpenAI, orchestrator: ScriptedOrchestrator
) -> None:
    orchestrator.script = lambda request: [chunk("Hel")]
    orchestrator.status, orchestrator.details = grpc.StatusCode.UNAVAILABLE, "verify replica lost"
    stream = await client.completions.create(model=MODEL, prompt="x", stream=True)
    assert (await anext(aiter(stream))).choices[0].text == "Hel"
    with pytest.raises(openai.APIError, match="verify replica lost"):
        await anext(aiter(stream))


async def test_one_failed_prompt_ends_all_calls_of_its_request(
    client: openai.AsyncOpenAI, orchestrator: ScriptedOrchestrator
) -> None:
    orchestrator.script = lambda request: () if request.text == "c" else [chunk("x"), completion()]
    with pytest.raises(openai.APIStatusError, match="without a completion"):
        await client.completions.create(model=MODEL, prompt=list("abcdef"))
    await becomes_true(lambda: orchestrator.num_open == 0, 0.5)


def test_the_blocking_client_works_too(orchestrator: ScriptedOrchestrator) -> None:
    async def run() -> tuple[str | None, str]:
        async with served_gateway(orchestrator) as gateway:
            return await asyncio.to_thread(ask, gateway.url)

    def ask(url: str) -> tuple[str | None, str]:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
            whole = client.chat.completions.create(model=MODEL, messages=USER)
            stream = client.completions.create(model=MODEL, prompt="x", stream=True)
            return whole.choices[0].message.content, "".join(one.choices[0].text for one in stream)

    assert asyncio.run(run()) == ("Hello world", "Hello world")
