"""Requests in JSON to the contract: each field, and each refusal with the field's name."""

import json
from typing import Any

import pytest

from amusd.v1 import orchestrator_pb2, sampling_pb2
from gateway.api_errors import ApiError
from gateway.chat_request import chat_job
from gateway.completion_request import completion_job
from gateway.job import Job
from gateway.request_fields import Fields

NAMES = ("model-a", "model-b")
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def completions(**fields: Any) -> Job:
    return completion_job(Fields({"prompt": "Hi", **fields}), NAMES, 1.0)


def chat(**fields: Any) -> Job:
    messages = [{"role": "user", "content": "Hi"}]
    return chat_job(Fields({"messages": messages, **fields}), NAMES, 1.0)


def only(job: Job) -> orchestrator_pb2.GenerateRequest:
    (request,) = job.requests
    return request


def test_what_is_unset_is_openai_s_default() -> None:
    request = only(completions())
    assert request == orchestrator_pb2.GenerateRequest(
        text="Hi",
        max_tokens=16,
        num_completions=1,
        sampling=sampling_pb2.Sampling(temperature=1.0),
    )
    assert not only(chat()).HasField("max_tokens")
    assert completion_job(Fields({"prompt": "Hi"}), NAMES, 0.0).requests[0].sampling == (
        sampling_pb2.Sampling(temperature=0.0)
    )


def test_every_field_reaches_the_contract() -> None:
    request = only(
        completions(
            model="model-b", max_tokens=7, min_tokens=2, temperature=0.5, top_p=0.9, top_k=40,
            min_p=0.05, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=-0.5,
            no_repeat_ngram_size=3, logit_bias={"5": 1.5, "7": -100}, allowed_token_ids=[5, 7],
            bad_words=["no", "way"], seed=11, stop=["a", "b"], stop_token_ids=[3],
            include_stop_str_in_output=True, ignore_eos=True, n=3, strategy="speculative",
            lookahead=4, logprobs=2, guided_regex="[a-z]+",
        )
    )  # fmt: skip
    assert request == orchestrator_pb2.GenerateRequest(
        text="Hi",
        max_tokens=7,
        min_tokens=2,
        stop=["a", "b"],
        stop_token_ids=[3],
        include_stop=True,
        ignore_eos=True,
        num_completions=3,
        strategy=orchestrator_pb2.STRATEGY_SPECULATIVE,
        lookahead=4,
        bad_texts=["no", "way"],
        logprobs=sampling_pb2.LogprobsOptions(num_top=2),
        sampling=sampling_pb2.Sampling(
            temperature=0.5,
            top_p=0.9,
            top_k=40,
            min_p=0.05,
            repetition_penalty=1.1,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            no_repeat_ngram_size=3,
            logit_bias={5: 1.5, 7: -100},
            allowed_token_ids=[5, 7],
            seed=11,
            constraint=sampling_pb2.Constraint(regex="[a-z]+"),
        ),
    )


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("model", {"model": "other"}),
        ("max_tokens", {"max_tokens": -1}),
        ("max_tokens", {"max_tokens": "many"}),
        ("max_tokens", {"max_tokens": True}),
        ("max_tokens", {"max_tokens": 1.5}),
        ("max_tokens", {"max_tokens": 2**31}),
        ("max_completion_tokens", {"max_completion_tokens": -1}),
        ("min_tokens", {"min_tokens": -1}),
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": 101}),
        ("temperature", {"temperature": "hot"}),
        ("temperature", {"temperature": True}),
        ("top_p", {"top_p": 0}),
        ("top_p", {"top_p": 1.1}),
        ("top_k", {"top_k": -2}),
        ("min_p", {"min_p": 1.5}),
        ("repetition_penalty", {"repetition_penalty": 0}),
        ("presence_penalty", {"presence_penalty": 2.1}),
        ("frequency_penalty", {"frequency_penalty": -2.1}),
        ("no_repeat_ngram_size", {"no_repeat_ngram_size": -1}),
        ("logit_bias", {"logit_bias": {"5": 101}}),
        ("logit_bias", {"logit_bias": {"the": 1}}),
        ("logit_bias", {"logit_bias": {"9" * 5000: 1}}),
        ("logit_bias.5", {"logit_bias": {"5": "much"}}),
        ("logit_bias", {"logit_bias": [5]}),
        ("allowed_token_ids", {"allowed_token_ids": [-1]}),
        ("allowed_token_ids", {"allowed_token_ids": "5"}),
        ("bad_words", {"bad_words": [""]}),
        ("bad_words", {"bad_words": "no"}),
        ("seed", {"seed": 2**64}),
        ("seed", {"seed": "lucky"}),
        ("stop", {"stop": [""]}),
        ("stop", {"stop": 5}),
        ("stop_token_ids", {"stop_token_ids": ["a"]}),
        ("ignore_eos", {"ignore_eos": "yes"}),
        ("n", {"n": 0}),
        ("n", {"n": 17}),
        ("best_of", {"best_of": 2}),
        ("strategy", {"strategy": "fast"}),
        ("lookahead", {"lookahead": 0}),
        ("stream", {"stream": "yes"}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("stream_options.include_usage", {"stream": True, "stream_options": {"include_usage": 1}}),
        ("use_beam_search", {"use_beam_search": True}),
        ("suffix", {"suffix": "end"}),
        ("response_format", {"response_format": {"type": "xml"}}),
        ("response_format.json_schema.schema", {"response_format": {"type": "json_schema"}}),
        ("guided_json", {"guided_json": 5}),
        ("guided_regex", {"guided_regex": ""}),
        ("guided_choice", {"guided_choice": []}),
        ("guided_choice", {"guided_choice": [""]}),
        ("guided_grammar", {"guided_grammar": "x" * 300_000}),
        ("structured_outputs.regex", {"structured_outputs": {"regex": 5}}),
        ("structured_outputs.structural_tag", {"structured_outputs": {"structural_tag": "x"}}),
        ("guided_regex", {"guided_regex": "a", "response_format": {"type": "json_object"}}),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(
    param: str, fields: dict[str, Any]
) -> None:
    for translate in (completions, chat):
        with pytest.raises(ApiError) as refused:
            translate(**fields)
        assert refused.value.param == param
        assert refused.value.status == (404 if param == "model" else 400)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("prompt", {"prompt": None}),
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [[]]}),
        ("prompt", {"prompt": ["a", 5]}),
        ("prompt", {"prompt": [5, "a"]}),
        ("prompt", {"prompt": [-1]}),
        ("prompt", {"prompt": [1.5]}),
        ("prompt", {"prompt": {"text": "a"}}),
        ("prompt", {"prompt": ["a"] * 1025}),
        ("logprobs", {"logprobs": 21}),
        ("logprobs", {"logprobs": -1}),
    ],
)
def test_a_wrong_completion_is_refused(param: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as refused:
        completions(**fields)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("messages", {"messages": []}),
        ("messages", {"messages": ["Hi"]}),
        ("messages[0].role", {"messages": [{"content": "Hi"}]}),
        ("messages[0].content", {"messages": [{"role": "user", "content": 5}]}),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        ),
        ("logprobs", {"logprobs": 5}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("tools", {"tools": [{"type": "function"}]}),
        ("tools", {"tools": [{"type": "web_search"}]}),
        ("tools[0].function.parameters", {"tools": [{**TOOL, "function": {
            "name": "f", "parameters": []}}]}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": "maybe"}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": {"type": "function",
         "function": {"name": "g"}}}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": {"type": "function"}}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": "required", "guided_regex": "a"}),
        ("functions", {"functions": [{}]}),
        ("modalities", {"modalities": ["text", "audio"]}),
    ],
)  # fmt: skip
def test_a_wrong_chat_is_refused(param: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as refused:
        chat(**fields)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("prompt", "num_tokens"),
    [("a", [0]), (["a", "b"], [0, 0]), ([1, 2, 3], [3]), ([[1], [2, 3]], [1, 2]),
     (["a", [1]], [0, 1])],
)  # fmt: skip
def test_prompts_are_texts_or_token_ids(prompt: Any, num_tokens: list[int]) -> None:
    job = completions(prompt=prompt, n=2)
    assert [len(one.tokens.ids) for one in job.requests] == num_tokens
    assert job.num_choices == 2 * len(num_tokens)


def test_a_negative_seed_is_a_seed() -> None:
    assert only(completions(seed=-1)).sampling.seed == 2**64 - 1


def test_every_token_is_spelled_in_two_ways() -> None:
    assert only(completions(top_k=-1)) == only(completions(top_k=0)) == only(completions())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"guided_json": {"type": "object"}}, {"json_schema": '{"type":"object"}'}),
        ({"guided_json": '{"type": "object"}'}, {"json_schema": '{"type": "object"}'}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["yes", "no"]}, {"choices": {"texts": ["yes", "no"]}}),
        ({"guided_grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
        ({"structured_outputs": {"json": {}}}, {"json_schema": "{}"}),
        ({"structured_outputs": {"json_object": True}}, {"json_object": True}),
        ({"structured_outputs": {"choice": ["a"]}}, {"choices": {"texts": ["a"]}}),
    ],
)
def test_the_form_of_the_output_has_many_spellings(
    fields: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    for translate in (completions, chat):
        sampling = only(translate(**fields)).sampling
        if expected is None:
            assert not sampling.HasField("constraint")
        else:
            assert sampling.constraint == sampling_pb2.Constraint(**expected)


def test_definitions_of_a_schema_are_where_its_references_look() -> None:
    city = {"$ref": "#/$defs/city"}
    parameters = {"type": "object", "properties": {"city": city}, "$defs": {"city": {}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    request = only(chat(tools=[tool], tool_choice="required"))
    schema = json.loads(request.sampling.constraint.json_schema)
    assert schema["$defs"] == {"city": {}}
    (call,) = schema["items"]["anyOf"]
    assert call["properties"]["parameters"] == {
        "type": "object",
        "properties": {"city": city},
    }


def test_tools_that_may_not_be_called_are_not_told() -> None:
    job = chat(tools=[TOOL], tool_choice="none")
    assert only(job).chat.template_arguments_json == ""


def test_messages_keep_their_further_fields_and_join_their_parts() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    request = only(
        chat(
            messages=[
                {"role": "user", "content": [{"type": "text", "text": one} for one in "ab"]},
                {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
                {"role": "tool", "content": "5", "tool_call_id": "1"},
            ],
            chat_template_kwargs={"enable_thinking": False},
        )
    )
    user, assistant, tool = request.chat.messages
    assert (user.content, user.fields_json) == ("a\nb", "")
    function = {"name": "f", "arguments": {"a": 1}}
    assert json.loads(assistant.fields_json) == {"tool_calls": [{**call, "function": function}]}
    assert json.loads(tool.fields_json) == {"tool_call_id": "1"}
    assert json.loads(request.chat.template_arguments_json) == {"enable_thinking": False}


def test_the_newer_name_of_max_tokens_wins() -> None:
    assert only(chat(max_tokens=5, max_completion_tokens=6)).max_tokens == 6


def test_fields_that_nobody_knows_are_ignored_and_named() -> None:
    assert list(chat(user="me", store=True, zzz=1).ignored) == ["store", "zzz"]
