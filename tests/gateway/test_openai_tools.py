"""Tool calls through the openai package."""

import json
from typing import Any

import openai

from tests.gateway.scripted_orchestrator import MODEL, ScriptedOrchestrator, said

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
