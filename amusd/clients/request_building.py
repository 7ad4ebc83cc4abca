"""Builds the request for a prompt and options.

It refuses what no field of a message holds. The server checks the rest.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from amusd.clients.chat_messages import Conversation, chat_messages, json_text
from amusd.clients.request_options import NO_OPTIONS, Options, logprobs_options
from amusd.prompts import Prompt
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.strategy import Strategy
from amusd.rpc import codec
from amusd.v1 import orchestrator_pb2, sampling_pb2

AnyPrompt = Prompt | str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text to continue, token ids to continue, a conversation, or a ``Prompt`` of one of them."""

_MAX_INT32 = 2**31 - 1
_MAX_UINT32 = 2**32 - 1
_MAX_UINT64 = 2**64 - 1
_SCALES = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
_COUNTS = ("top_k", "no_repeat_ngram_size")
_FORMS = ("json_schema", "json_object", "regex", "choices", "grammar")


def generate_request(
    prompt: AnyPrompt, options: Options = NO_OPTIONS
) -> orchestrator_pb2.GenerateRequest:
    """Return the request to continue a prompt.

    Raises:
        InvalidInputError: prompt or options are of no use; the error names what is wrong.
    """
    request = _request(options)
    match prompt:
        case Prompt():
            _set_prompt(request, prompt, options)
        case str():
            request.text = _utf8(prompt, "the prompt")
        case [Mapping(), *_]:
            _set_chat(request, prompt, options)  # type: ignore[arg-type]  # no token ids
        case [_, *_]:
            request.tokens.ids.extend(_integer(one, "token", _MAX_UINT32) for one in prompt)
        case _:
            raise _no_prompt(prompt)
    if request.WhichOneof("prompt") != "chat":
        _refuse_chat_options(options)
    return request


def chat_request(
    conversation: Conversation, options: Options = NO_OPTIONS
) -> orchestrator_pb2.GenerateRequest:
    """Return the request to answer a conversation.

    Raises:
        InvalidInputError: as for ``generate_request``.
    """
    request = _request(options)
    _set_chat(request, conversation, options)
    return request


def _request(options: Options) -> orchestrator_pb2.GenerateRequest:
    """Return a request with everything but the prompt."""
    request = orchestrator_pb2.GenerateRequest(
        stop_token_ids=[_integer(one, "stop token", _MAX_UINT32) for one in options.stop_token_ids],
        ignore_eos=options.ignore_eos,
        timeline=options.timeline,
        stop=_texts(options.stop, "stop"),
        include_stop=options.include_stop,
        min_tokens=_integer(options.min_tokens, "min_tokens", _MAX_UINT32),
        num_completions=_num_completions(options.n),
        sampling=_sampling(options),
        logprobs=_logprobs(options),
    )
    if options.strategy is not None:
        request.strategy = codec.strategy_to_proto(_strategy(options.strategy))
    if options.max_tokens is not None:
        request.max_tokens = _integer(options.max_tokens, "max_tokens", _MAX_INT32)
    if options.lookahead is not None:
        request.lookahead = _integer(options.lookahead, "lookahead", _MAX_UINT32)
    return request


def _num_completions(n: int) -> int:
    """Return the field's value, which is 0 for one completion."""
    number = _integer(n, "n", _MAX_UINT32, least=1)
    return number if number > 1 else 0


def _sampling(options: Options) -> sampling_pb2.Sampling | None:
    """Return how tokens are chosen; None if nothing is set."""
    sampling = sampling_pb2.Sampling(
        allowed_token_ids=[
            _integer(one, "token of allowed_token_ids", _MAX_UINT32)
            for one in options.allowed_token_ids
        ],
        bad_words=[_bad_word(word) for word in options.bad_words],
        constraint=_constraint(options),
    )
    for name in _SCALES:
        if (value := getattr(options, name)) is not None:
            setattr(sampling, name, _number(value, name))
    for name in _COUNTS:
        if (value := getattr(options, name)) is not None:
            setattr(sampling, name, _integer(value, name, _MAX_UINT32))
    if options.seed is not None:
        sampling.seed = _integer(options.seed, "seed", _MAX_UINT64)
    for token, bias in options.logit_bias.items():
        token = _integer(token, "token of logit_bias", _MAX_UINT32)  # noqa: PLW2901
        sampling.logit_bias[token] = _number(bias, f"logit_bias of token {token}")
    return sampling if sampling.ByteSize() else None


def _bad_word(word: Sequence[int]) -> sampling_pb2.TokenSequence:
    if isinstance(word, str):
        raise InvalidInputError(f"bad_words has the text {word!r}: give the token ids of each word")
    ids = [_integer(one, "token of bad_words", _MAX_UINT32) for one in word]
    return sampling_pb2.TokenSequence(ids=ids)


def _constraint(options: Options) -> sampling_pb2.Constraint | None:
    values = ((name, getattr(options, name)) for name in _FORMS)
    forms = {name: value for name, value in values if value is not None and value is not False}
    if len(forms) > 1:
        raise InvalidInputError(f"{' and '.join(forms)} are set: an output has one form at most")
    for name, value in forms.items():
        match name:
            case "json_object":
                return sampling_pb2.Constraint(json_object=True)
            case "choices":
                choices = sampling_pb2.Choices(texts=_texts(value, name))
                return sampling_pb2.Constraint(choices=choices)
            case "json_schema" if not isinstance(value, str):
                return sampling_pb2.Constraint(json_schema=json_text(value, name))
        constraint = sampling_pb2.Constraint()
        setattr(constraint, name, _utf8(value, name))
        return constraint
    return None


def _logprobs(options: Options) -> sampling_pb2.LogprobsOptions | None:
    found = logprobs_options(options.logprobs)
    if found is None:
        return None
    return sampling_pb2.LogprobsOptions(
        num_top=found.num_top, is_processed=found.is_processed, has_prompt=found.has_prompt
    )


def _set_prompt(
    request: orchestrator_pb2.GenerateRequest, prompt: Prompt, options: Options
) -> None:
    if prompt.messages:
        pairs = [{"role": role, "content": content} for role, content in prompt.messages]
        _set_chat(request, pairs, options)
    elif prompt.tokens:
        request.tokens.ids.extend(_integer(one, "token", _MAX_UINT32) for one in prompt.tokens)
    else:
        request.text = _utf8(prompt.text, "the prompt")


def _set_chat(
    request: orchestrator_pb2.GenerateRequest, conversation: Conversation, options: Options
) -> None:
    try:
        request.chat.messages.extend(chat_messages(conversation))
    except UnicodeEncodeError as error:
        raise _not_utf8("the prompt", error) from None
    request.chat.parse_special_tokens = options.parse_special_tokens
    arguments = dict(options.template_arguments)
    if options.tools:
        arguments["tools"] = list(options.tools)
    if arguments:
        request.chat.template_arguments_json = json_text(arguments, "tools or template_arguments")


def _no_prompt(prompt: Any) -> InvalidInputError:
    problem = "is empty" if isinstance(prompt, Sequence) else f"is a {type(prompt).__name__}"
    return InvalidInputError(f"the prompt {problem}: give a text, a list of token ids or messages")


def _refuse_chat_options(options: Options) -> None:
    for name in ("tools", "template_arguments", "parse_special_tokens"):
        if getattr(options, name):
            raise InvalidInputError(f"{name} needs a conversation: send the prompt as messages")


def _strategy(strategy: Strategy | str) -> Strategy:
    try:
        return Strategy(strategy)
    except ValueError:
        known = ", ".join(one.value for one in Strategy)
        raise InvalidInputError(f"unknown strategy {strategy!r}: use {known}") from None


def _integer(number: Any, name: str, most: int, least: int = 0) -> int:
    """Return a whole number that a field holds."""
    if isinstance(number, bool) or not hasattr(number, "__index__"):
        raise InvalidInputError(f"{name} is {number!r}: use a whole number")
    if not least <= number <= most:
        raise InvalidInputError(f"{name} is {number}: a request holds {least} to {most}")
    return int(number)


def _number(number: Any, name: str) -> float:
    try:
        return float(number)
    except (TypeError, ValueError):
        raise InvalidInputError(f"{name} is {number!r}: use a number") from None


def _texts(texts: str | Sequence[str], name: str) -> list[str]:
    return [_utf8(one, name) for one in ((texts,) if isinstance(texts, str) else texts)]


def _utf8(text: Any, name: str) -> str:
    """Return a text that a field holds: it has no lone surrogates, which UTF-8 cannot encode."""
    if not isinstance(text, str):
        raise InvalidInputError(f"{name} is {text!r}: use a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _not_utf8(name, error) from None
    return text


def _not_utf8(name: str, error: UnicodeEncodeError) -> InvalidInputError:
    return InvalidInputError(
        f"{name} cannot be sent as UTF-8: {error.reason} at character {error.start}"
    )
