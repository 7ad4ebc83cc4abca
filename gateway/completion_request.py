"""A request of /v1/completions, from JSON to the contract."""

from collections.abc import Iterable, Iterator
from typing import Any

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

_DEFAULT_MAX_TOKENS = 16  # OpenAI's
_MAX_PROMPTS = 1024
_MAX_LOGPROBS = 20


def completion_job(fields: Fields, model_names: Iterable[str], default_temperature: float) -> Job:
    """Return what a request asks for.

    Raises:
        ApiError: a field is wrong; it names the field.
    """
    check_refused(fields)
    model, delivery = served_model(fields, model_names), delivery_of(fields)
    num_completions, logprobs = num_completions_of(fields), _logprobs(fields)
    echo = fields.flag("echo")
    max_tokens = max_tokens_of(fields)
    max_tokens = _DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
    echo_only = echo and max_tokens == 0
    common = generate_request(fields, default_temperature, constraint_of(fields, None))
    common.max_tokens = 1 if echo_only else max_tokens
    common.num_completions = num_completions
    if logprobs is not None or echo:
        # Without log-probabilities the echo of token ids needs the texts of the prompt's tokens.
        common.logprobs.CopyFrom(logprobs_options(logprobs or 0, has_prompt=echo))
    requests = tuple(_with_prompt(common, prompt) for prompt in _prompts(fields))
    if logprobs is None and all(request.HasField("text") for request in requests):
        for request in requests:
            request.ClearField("logprobs")
    return Job(
        requests,
        model,
        num_completions,
        delivery.stream,
        delivery.include_usage,
        logprobs=logprobs is not None,
        token_ids=fields.flag("return_token_ids"),
        echo=tuple(request.text for request in requests) if echo else None,
        echo_only=echo_only,
        ignored=_ignored(fields),
    )


def _ignored(fields: Fields) -> list[str]:
    fields.value("user")
    return fields.ignored


def _logprobs(fields: Fields) -> int | None:
    if fields.value("logprobs") is False:
        return None
    return fields.integer("logprobs", 0, _MAX_LOGPROBS)


def _prompts(fields: Fields) -> Iterator[str | list[Any]]:
    """Yield the prompts: each a text or a list that should be token ids."""
    prompt = fields.value("prompt")
    many = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int | float)
    prompts = prompt if many else [prompt]
    if len(prompts) > _MAX_PROMPTS:
        raise bad_field("prompt", f"prompt has {len(prompts)} prompts: send at most {_MAX_PROMPTS}")
    for one in prompts:
        if not one or not isinstance(one, str | list):
            raise bad_field(
                "prompt",
                "prompt is no text, list of texts, token ids or list of token ids, or empty",
            )
        yield one


def _with_prompt(
    common: orchestrator_pb2.GenerateRequest, prompt: str | list[Any]
) -> orchestrator_pb2.GenerateRequest:
    request = orchestrator_pb2.GenerateRequest()
    request.CopyFrom(common)
    if isinstance(prompt, str):
        request.text = prompt
        return request
    try:
        request.tokens.ids.extend(prompt)
    except (TypeError, ValueError):
        raise bad_field("prompt", "prompt has something that is no token id") from None
    return request
