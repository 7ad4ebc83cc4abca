"""The sampling of a request, from the fields of OpenAI and vLLM to the contract."""

import re
from typing import Any

from amusd.protocol.errors import InvalidInputError
from amusd.sampling.parameters import Constraint, SamplingParameters
from amusd.v1 import sampling_pb2
from gateway import api_errors
from gateway.api_errors import bad_field
from gateway.output_form import constraint_to_proto
from gateway.request_fields import MAX_UINT32, Fields

_SCALARS = (
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "top_k",
    "no_repeat_ngram_size",
)
_DEFAULTS = SamplingParameters()
_ID = re.compile(r"[0-9]{1,10}")


def sampling_of(
    fields: Fields, default_temperature: float, constraint: Constraint | None
) -> sampling_pb2.Sampling:
    """Return how tokens are chosen. A request without temperature has ``default_temperature``.

    Raises:
        ApiError: a value is out of range; it names the field.
    """
    try:
        parameters = SamplingParameters(
            temperature=fields.number("temperature", default_temperature),
            top_p=fields.number("top_p", _DEFAULTS.top_p),
            min_p=fields.number("min_p", _DEFAULTS.min_p),
            repetition_penalty=fields.number("repetition_penalty", _DEFAULTS.repetition_penalty),
            presence_penalty=fields.number("presence_penalty", _DEFAULTS.presence_penalty),
            frequency_penalty=fields.number("frequency_penalty", _DEFAULTS.frequency_penalty),
            # vLLM's clients write -1 for all tokens.
            top_k=max(fields.integer("top_k", -1) or 0, 0),
            no_repeat_ngram_size=fields.integer("no_repeat_ngram_size", 0) or 0,
            logit_bias=_logit_bias(fields),
            allowed_token_ids=tuple(fields.integers("allowed_token_ids")),
            constraint=constraint,
        )
    except InvalidInputError as error:
        raise api_errors.of_error(error) from error
    return _to_proto(parameters, fields.integer("seed", -(2**63), 2**64 - 1))


def _logit_bias(fields: Fields) -> tuple[tuple[int, float], ...]:
    inner = fields.inner("logit_bias")
    if inner is None:
        return ()
    biases = []
    for name in inner.ignored:
        if not (_ID.fullmatch(name) and int(name) <= MAX_UINT32):
            raise bad_field("logit_bias", f"logit_bias names {name[:20]!r}, which is no token id")
        biases.append((int(name), inner.number(name, 0.0)))
    return tuple(biases)


def _to_proto(parameters: SamplingParameters, seed: int | None) -> sampling_pb2.Sampling:
    changed: dict[str, Any] = {
        name: getattr(parameters, name)
        for name in _SCALARS
        if getattr(parameters, name) != getattr(_DEFAULTS, name)
    }
    sampling = sampling_pb2.Sampling(
        temperature=parameters.temperature,
        logit_bias=dict(parameters.logit_bias),
        allowed_token_ids=parameters.allowed_token_ids,
        **changed,
    )
    if parameters.constraint is not None:
        sampling.constraint.CopyFrom(constraint_to_proto(parameters.constraint))
    if seed is not None:
        sampling.seed = seed % 2**64  # a negative seed is a seed, too
    return sampling
