"""The openai package against a gateway: every answer in the shape that it expects."""

import asyncio
import json
from collections.abc import AsyncIterator
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
    said,
    served_gateway,
)

USER: list[Any] = [{"role": "user", "content": "Hi"}]
WEATHER: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


@pytest.fixture
def orchestrator() -> ScriptedOrchestrator:
    return ScriptedOrchestrator()


@pytest.fixture
async def client(orchestrator: ScriptedOrchestrator) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        served_gateway(orchestrator) as gateway,
        openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="-", max_retries=0) as made,
    ):
        yield made


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


async def test_a_model_that_calls_a_tool(
    client: openai.AsyncOpenAI, orchestrator: ScriptedOrchestrator
) -> None:
    orchestrator.script = said(
        "Let me see. <tool", '_call>\n{"name": "weather", "argu', 'ments": {"city": "Rome"}}\n',
        "</tool_call>",
    )  # fmt: skip
    answer = await client.chat.completions.create(model=MODEL, messages=USER, tools=WEATHER)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    (request,) = orchestrator.requests
    assert json.loads(request.chat.template_arguments_json) == {"tools": WEATHER}
    assert not request.sampling.HasField("constraint")

    answered = [
        *USER,
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    await client.chat.completions.create(model=MODEL, messages=answered, tools=WEATHER)
    _, said_by_model, result = orchestrator.requests[-1].chat.messages
    fields = json.loads(said_by_model.fields_json)
    assert fields["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    assert json.loads(result.fields_json) == {"tool_call_id": call.id}


async def test_a_streamed_tool_call_is_one_delta(
    client: openai.AsyncOpenAI, orchestrator: ScriptedOrchestrator
) -> None:
    orchestrator.script = said('{"name": "wea', 'ther", "parameters": {"city": "Oslo"}}')
    stream = await client.chat.completions.create(
        model=MODEL, messages=USER, tools=WEATHER, stream=True
    )
    chunks = [one async for one in stream]
    calls = [call for one in chunks for call in one.choices[0].delta.tool_calls or ()]
    (call,) = calls
    assert call.index == 0
    assert call.function is not None
    assert call.function.name == "weather"
    assert call.function.arguments is not None
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


async def test_a_named_function_constrains_the_output_to_its_arguments(
    client: openai.AsyncOpenAI, orchestrator: ScriptedOrchestrator
) -> None:
    orchestrator.script = said('{"city":', ' "Rome"}')
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    answer = await client.chat.completions.create(
        model=MODEL, messages=USER, tools=WEATHER, tool_choice=choice
    )
    message = answer.choices[0].message
    assert message.content is None
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Rome"}')
    assert answer.choices[0].finish_reason == "stop"
    schema = orchestrator.requests[0].sampling.constraint.json_schema
    assert json.loads(schema) == WEATHER[0]["function"]["parameters"]

    stream = await client.chat.completions.create(
        model=MODEL, messages=USER, tools=WEATHER, tool_choice=choice, stream=True
    )
    calls = [call async for one in stream for call in one.choices[0].delta.tool_calls or ()]
    assert {one.index for one in calls} == {0}
    pieces = [one.function.arguments for one in calls if one.function is not None]
    assert pieces == ["", '{"city":', ' "Rome"}']


async def test_a_required_call_constrains_the_output_to_a_list_of_calls(
    client: openai.AsyncOpenAI, orchestrator: ScriptedOrchestrator
) -> None:
    calls = [{"name": "weather", "parameters": {"city": city}} for city in ("Rome", "Oslo")]
    orchestrator.script = said(*json.dumps(calls))
    for parallel in (True, False):
        answer = await client.chat.completions.create(
            model=MODEL,
            messages=USER,
            tools=WEATHER,
            tool_choice="required",
            parallel_tool_calls=parallel,
        )
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls is not None
        cities = [json.loads(one.function.arguments)["city"]  # type: ignore[union-attr]
                  for one in choice.message.tool_calls]  # fmt: skip
        assert cities == (["Rome", "Oslo"] if parallel else ["Rome"])
    first, second = (
        json.loads(one.sampling.constraint.json_schema) for one in orchestrator.requests
    )
    assert first["minItems"] == 1
    assert "maxItems" not in first
    assert second["maxItems"] == 1


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
