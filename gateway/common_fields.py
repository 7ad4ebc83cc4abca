"""The fields that both endpoints share, from JSON to the contract."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from amusd.protocol.strategy import Strategy
from amusd.rpc import codec
from amusd.sampling.parameters import Constraint
from amusd.v1 import orchestrator_pb2, sampling_pb2
from gateway.api_errors import ApiError, bad_field
from gateway.request_fields import Fields
from gateway.sampling_fields import sampling_of

MAX_COMPLETIONS = 16
_MAX_INT32 = 2**31 - 1
_REFUSED = {
    "suffix": "only the end of a prompt can be continued",
    "use_beam_search": "use n for several completions",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "only text is served",
}


@dataclass(frozen=True, slots=True)
class Delivery:
    """How the answer comes: as one object, or as a stream with or without usage at its end."""

    stream: bool = False
    include_usage: bool = False


def check_refused(fields: Fields) -> None:
    """Refuse fields that would change the output and are not served.

    Raises:
        ApiError: one is set.
    """
    for name, advice in _REFUSED.items():
        if fields.value(name):
            raise bad_field(name, f"{name} is not served: {advice}")
    if "audio" in fields.texts("modalities"):
        raise bad_field("modalities", "modalities has audio: only text is served")


def served_model(fields: Fields, names: Iterable[str]) -> str:
    """Return the model of a request; empty if it names none.

    Raises:
        ApiError: the model is none of ``names``.
    """
    model = fields.text("model")
    known = list(names)
    if model and model not in known:
        raise ApiError(
            404,
            f"the model {model!r} does not exist: use {' or '.join(known)}",
            param="model",
            code="model_not_found",
        )
    return model


def delivery_of(fields: Fields) -> Delivery:
    """Return how the answer comes."""
    stream, options = fields.flag("stream"), fields.inner("stream_options")
    if options is None:
        return Delivery(stream)
    if not stream:
        raise bad_field(
            "stream_options", "stream_options is set without stream: set stream to true"
        )
    return Delivery(stream, options.flag("include_usage"))


def num_completions_of(fields: Fields) -> int:
    """Return how many completions each prompt gets."""
    number = fields.integer("n", 1, MAX_COMPLETIONS) or 1
    best_of = fields.integer("best_of", 1)
    if best_of is not None and best_of not in (number, 1):
        raise bad_field(
            "best_of", f"best_of is {best_of}: choosing among outputs is not served, use n"
        )
    return number


def max_tokens_of(fields: Fields) -> int | None:
    """Return the maximum length of an output; None if the request sets none."""
    named = fields.integer("max_tokens", 0, _MAX_INT32)
    completion = fields.integer("max_completion_tokens", 0, _MAX_INT32)
    return named if completion is None else completion


def generate_request(
    fields: Fields, default_temperature: float, constraint: Constraint | None
) -> orchestrator_pb2.GenerateRequest:
    """Return the request for one prompt, without the prompt and its number of completions.

    Raises:
        ApiError: a field is wrong.
    """
    request = orchestrator_pb2.GenerateRequest(
        strategy=_strategy(fields),
        lookahead=fields.integer("lookahead", 1),
        sampling=sampling_of(fields, default_temperature, constraint),
        min_tokens=fields.integer("min_tokens", 0, _MAX_INT32) or 0,
        stop_token_ids=fields.integers("stop_token_ids"),
        ignore_eos=fields.flag("ignore_eos"),
        include_stop=fields.flag("include_stop_str_in_output"),
    )
    add_texts("stop", fields.texts("stop", or_text=True), request.stop.extend)
    add_texts("bad_words", fields.texts("bad_words"), request.bad_texts.extend)
    return request


def add_texts(name: str, texts: list[str], add: Callable[[list[str]], None]) -> None:
    """Add ``texts`` of the field ``name``, none of which may be empty."""
    if not all(texts):
        raise bad_field(name, f"{name} has an empty text")
    add(texts)


def logprobs_options(num_top: int, has_prompt: bool = False) -> sampling_pb2.LogprobsOptions:
    """Return which log-probabilities the contract is asked for: those of the model's own logits."""
    return sampling_pb2.LogprobsOptions(num_top=num_top, has_prompt=has_prompt)


def _strategy(fields: Fields) -> orchestrator_pb2.Strategy.ValueType:
    name = fields.text("strategy")
    if not name:
        return orchestrator_pb2.STRATEGY_UNSPECIFIED
    try:
        return codec.strategy_to_proto(Strategy(name.lower()))
    except ValueError:
        known = ", ".join(one.value for one in Strategy)
        raise bad_field("strategy", f"strategy is {name[:40]!r}: use one of {known}") from None
