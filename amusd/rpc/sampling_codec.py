"""Conversions between the messages of sampling and the values of ``amusd.sampling``.

A value that exists is valid: what a message holds is checked here, or where the value is made.
Values are canonical, so messages that mean the same give equal values: token ids of maps and sets
are sorted, and greedy decoding has the seed 0.
"""

from collections.abc import Iterable

from amusd.protocol.errors import InvalidInputError
from amusd.sampling.parameters import (
    MAX_BAD_WORDS,
    MAX_BIASES,
    Constraint,
    ConstraintKind,
    LogprobsOptions,
    SamplingParameters,
    SequenceSampling,
    TokenLogprobs,
)
from amusd.v1 import draft_pb2, sampling_pb2, verify_pb2

MAX_LISTED_TOKENS = 1 << 16
"""Most token ids in ``allowed_token_ids`` or ``banned_token_ids``: sorting takes 10 ms."""
_MAX_TOP_K = 2**31 - 1  # as good as any larger one, and an int32 for every engine


def sampling_from_proto(
    message: sampling_pb2.Sampling, default_seed: int | None = None
) -> SamplingParameters:
    """Return the sampling parameters of a message, with the defaults of what is unset.

    Args:
        message: the parameters.
        default_seed: the seed of a message that sets none; None: a seed that is used must be set.

    Raises:
        InvalidInputError: a value is out of range; the error names its field.
    """
    _check_number("logit_bias", len(message.logit_bias), MAX_BIASES)
    _check_number("bad_words", len(message.bad_words), MAX_BAD_WORDS)
    _check_number("allowed_token_ids", len(message.allowed_token_ids), MAX_LISTED_TOKENS)
    has_constraint = message.HasField("constraint")
    return SamplingParameters(
        temperature=message.temperature,
        top_k=min(message.top_k, _MAX_TOP_K),
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        min_p=message.min_p,
        repetition_penalty=(
            message.repetition_penalty if message.HasField("repetition_penalty") else 1.0
        ),
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        no_repeat_ngram_size=message.no_repeat_ngram_size,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        allowed_token_ids=_sorted(message.allowed_token_ids),
        bad_words=tuple(tuple(word.ids) for word in message.bad_words),
        seed=_seed(message, default_seed),
        constraint=constraint_from_proto(message.constraint) if has_constraint else None,
    )


def sampling_to_proto(parameters: SamplingParameters) -> sampling_pb2.Sampling:
    """Return the message of sampling parameters."""
    constraint = parameters.constraint
    return sampling_pb2.Sampling(
        temperature=parameters.temperature,
        top_k=parameters.top_k,
        top_p=parameters.top_p,
        min_p=parameters.min_p,
        repetition_penalty=parameters.repetition_penalty,
        presence_penalty=parameters.presence_penalty,
        frequency_penalty=parameters.frequency_penalty,
        no_repeat_ngram_size=parameters.no_repeat_ngram_size,
        logit_bias=dict(parameters.logit_bias),
        allowed_token_ids=parameters.allowed_token_ids,
        bad_words=[sampling_pb2.TokenSequence(ids=word) for word in parameters.bad_words],
        seed=parameters.seed,
        constraint=None if constraint is None else constraint_to_proto(constraint),
    )


def constraint_from_proto(message: sampling_pb2.Constraint) -> Constraint:
    """Return the constraint of a message.

    Raises:
        InvalidInputError: it has no form, or one that is empty or too long.
    """
    match message.WhichOneof("form"):
        case "json_schema":
            return Constraint(ConstraintKind.JSON_SCHEMA, message.json_schema)
        case "json_object":
            if not message.json_object:
                raise InvalidInputError(
                    "constraint.json_object is false: set it to true, or leave the constraint out"
                )
            return Constraint(ConstraintKind.JSON_OBJECT)
        case "regex":
            return Constraint(ConstraintKind.REGEX, message.regex)
        case "choices":
            return Constraint(ConstraintKind.CHOICES, choices=tuple(message.choices.texts))
        case "grammar":
            return Constraint(ConstraintKind.GRAMMAR, message.grammar)
        case _:
            forms = ", ".join(kind.value for kind in ConstraintKind)
            raise InvalidInputError(f"the constraint has no form: set one of {forms}")


def constraint_to_proto(constraint: Constraint) -> sampling_pb2.Constraint:
    """Return the message of a constraint."""
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            return sampling_pb2.Constraint(json_schema=constraint.text)
        case ConstraintKind.JSON_OBJECT:
            return sampling_pb2.Constraint(json_object=True)
        case ConstraintKind.REGEX:
            return sampling_pb2.Constraint(regex=constraint.text)
        case ConstraintKind.CHOICES:
            return sampling_pb2.Constraint(choices=sampling_pb2.Choices(texts=constraint.choices))
        case ConstraintKind.GRAMMAR:
            return sampling_pb2.Constraint(grammar=constraint.text)


def context_to_proto(sampling: SequenceSampling) -> sampling_pb2.SequenceContext:
    """Return the message of what a session knows beside its sampling parameters."""
    return sampling_pb2.SequenceContext(
        num_prompt_tokens=sampling.num_prompt_tokens,
        min_position=sampling.min_position,
        banned_token_ids=sampling.banned_token_ids,
    )


def sequence_sampling_from_proto(
    opening: draft_pb2.ProposeOpen | verify_pb2.VerifyOpen,
) -> SequenceSampling:
    """Return the sampling that a session is opened with.

    Raises:
        InvalidInputError: a value is out of range, or a seed is missing; the error names the field.
    """
    context, num_tokens = opening.context, len(opening.token_ids)
    if context.num_prompt_tokens > num_tokens:
        raise InvalidInputError(
            f"context.num_prompt_tokens is {context.num_prompt_tokens}: the session is opened with "
            f"{num_tokens} tokens"
        )
    _check_number("context.banned_token_ids", len(context.banned_token_ids), MAX_LISTED_TOKENS)
    logprobs = None
    if isinstance(opening, verify_pb2.VerifyOpen) and opening.HasField("logprobs"):
        logprobs = options_from_proto(opening.logprobs)
    return SequenceSampling(
        sampling_from_proto(opening.sampling),
        context.num_prompt_tokens or num_tokens,
        context.min_position,
        _sorted(context.banned_token_ids),
        logprobs,
    )


def options_from_proto(message: sampling_pb2.LogprobsOptions) -> LogprobsOptions:
    """Return which log-probabilities a message asks for.

    Raises:
        InvalidInputError: it asks for too many.
    """
    return LogprobsOptions(message.num_top, message.is_processed, message.has_prompt)


def options_to_proto(options: LogprobsOptions | None) -> sampling_pb2.LogprobsOptions | None:
    """Return the message of which log-probabilities are asked for, or None for None."""
    if options is None:
        return None
    return sampling_pb2.LogprobsOptions(
        num_top=options.num_top,
        is_processed=options.is_processed,
        has_prompt=options.has_prompt,
    )


def logprobs_from_proto(
    messages: Iterable[sampling_pb2.PositionLogprobs],
) -> tuple[TokenLogprobs, ...]:
    """Return log-probabilities, one for each message, without the texts of the tokens."""
    return tuple(
        TokenLogprobs(
            message.token.token_id,
            message.token.logprob,
            tuple((one.token_id, one.logprob) for one in message.top),
        )
        for message in messages
    )


def logprobs_to_proto(
    positions: Iterable[TokenLogprobs],
) -> list[sampling_pb2.PositionLogprobs]:
    """Return the messages of log-probabilities, one for each position, without texts."""
    return [
        sampling_pb2.PositionLogprobs(
            token=sampling_pb2.TokenLogprob(token_id=one.token, logprob=one.logprob),
            top=[
                sampling_pb2.TokenLogprob(token_id=token, logprob=logprob)
                for token, logprob in one.top
            ],
        )
        for one in positions
    ]


def _seed(message: sampling_pb2.Sampling, default: int | None) -> int:
    """Return the seed of a message; 0 for greedy decoding, which uses none."""
    if message.temperature == 0.0:
        return 0
    if message.HasField("seed"):
        return message.seed
    if default is None:
        raise InvalidInputError("sampling.seed is unset: a temperature above 0 needs a seed")
    return default


def _check_number(name: str, number: int, most: int) -> None:
    """Refuse long lists before they are copied: a message may hold millions of tokens."""
    if number > most:
        raise InvalidInputError(f"{name} has {number} entries: send at most {most}")


def _sorted(tokens: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(tokens)))
