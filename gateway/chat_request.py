"""A request of /v1/chat/completions, from JSON to the contract."""

from collections.abc import Iterable
from typing import Any

import orjson

from amusd.v1 import orchestrator_pb2
from gateway.api_errors import bad_field
from gateway.common_fields import (
    check_refused,
    delivery_of,
    generate_request,
    logprobs_options,
    max_tokens_of,
    num_completions_of,
    served_model,
)
from gateway.job import Job
from gateway.output_form import constraint_of
from gateway.request_fields import Fields
from gateway.tool_choice import ToolChoice, tool_choice_of

_MAX_LOGPROBS = 20


def chat_job(fields: Fields, model_names: Iterable[str], default_temperature: float) -> Job:
    """Return what a request asks for.

    Raises:
        ApiError: a field is wrong; it names the field.
    """
    check_refused(fields)
    model, delivery = served_model(fields, model_names), delivery_of(fields)
    num_completions, logprobs = num_completions_of(fields), _logprobs(fields)
    tools = tool_choice_of(fields)
    constraint = constraint_of(fields, tools.schema() if tools is not None else None)
    request = generate_request(fields, default_temperature, constraint)
    max_tokens = max_tokens_of(fields)
    if max_tokens is not None:
        request.max_tokens = max_tokens
    request.num_completions = num_completions
    if logprobs is not None:
        request.logprobs.CopyFrom(logprobs_options(logprobs))
    request.chat.CopyFrom(_chat(fields, tools))
    fields.value("user")
    return Job(
        (request,),
        model,
        num_completions,
        delivery.stream,
        delivery.include_usage,
        logprobs=logprobs is not None,
        token_ids=fields.flag("return_token_ids"),
        tools=tools,
        ignored=fields.ignored,
    )


def _logprobs(fields: Fields) -> int | None:
    wanted, num_top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, _MAX_LOGPROBS)
    if num_top and not wanted:
        raise bad_field(
            "top_logprobs", "top_logprobs is set without logprobs: set logprobs to true"
        )
    return num_top or 0 if wanted else None


def _chat(fields: Fields, tools: ToolChoice | None) -> orchestrator_pb2.Chat:
    messages = [_message(one) for one in fields.inner_list("messages")]
    if not messages:
        raise bad_field("messages", "messages is empty: send at least one message")
    inner = fields.inner("chat_template_kwargs")
    arguments = {name: inner.value(name) for name in inner.ignored} if inner is not None else {}
    documents = fields.inner_list("documents")
    if documents:
        arguments["documents"] = fields.value("documents")
    if tools is not None and tools.described:
        arguments["tools"] = tools.described
    return orchestrator_pb2.Chat(messages=messages, template_arguments_json=_json(arguments))


def _message(fields: Fields) -> orchestrator_pb2.ChatMessage:
    role = fields.text("role")
    if not role:
        raise bad_field(fields.name_of("role"), f"{fields.name_of('role')} is missing")
    content = _content(fields)
    calls = [_with_parsed_arguments(call) for call in fields.inner_list("tool_calls")]
    others = {name: fields.value(name) for name in fields.ignored}
    if calls:
        others["tool_calls"] = calls
    return orchestrator_pb2.ChatMessage(role=role, content=content, fields_json=_json(others))


def _content(fields: Fields) -> str:
    """Return the text of a message; parts are joined by line breaks, as vLLM does."""
    if not isinstance(fields.value("content"), list):
        return fields.text("content")
    texts = []
    for part in fields.inner_list("content"):
        kind = part.text("type")
        if kind not in ("text", "refusal"):
            name = part.name_of("type")
            raise bad_field("messages", f"{name} is {kind!r}: only text is served")
        texts.append(part.text(kind))
    return "\n".join(texts)


def _with_parsed_arguments(call: Fields) -> dict[str, Any]:
    """Return a tool call as chat templates read it: with its arguments as an object."""
    found = {name: call.value(name) for name in call.ignored}
    function = call.inner("function")
    if function is None:
        return found
    described = {name: function.value(name) for name in function.ignored}
    arguments = described.get("arguments")
    if isinstance(arguments, str):
        try:
            described["arguments"] = orjson.loads(arguments) if arguments else {}
        except orjson.JSONDecodeError:
            name = function.name_of("arguments")
            raise bad_field("messages", f"{name} is no valid JSON") from None
    return {**found, "function": described}


def _json(values: dict[str, Any]) -> str:
    known = {name: value for name, value in values.items() if value is not None}
    return orjson.dumps(known).decode() if known else ""
