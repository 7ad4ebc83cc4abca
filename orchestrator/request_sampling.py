"""From a request to how its tokens are chosen: defaults, the seed, and what contradicts itself.

The draft and the verify service get the same values, so everything that can be random or can depend
on a default is settled here.
"""

import secrets

from amusd.fleet.model_description import ModelDescription
from amusd.protocol.errors import InvalidInputError
from amusd.rpc.sampling_codec import (
    MAX_LISTED_TOKENS,
    options_from_proto,
    sampling_from_proto,
)
from amusd.sampling.parameters import LogprobsOptions, SamplingParameters, SequenceSampling
from amusd.v1 import orchestrator_pb2

MAX_PROMPT_LOGPROBS = 100_000
"""Most log-probabilities of a prompt, over all its tokens. A verdict carries them in one message,
which holds 4 MiB, and each takes 12 bytes."""
_NUM_SEED_BITS = 64


def sampling_of(
    request: orchestrator_pb2.GenerateRequest,
    model: ModelDescription,
    num_prompt: int,
    max_tokens: int,
) -> SequenceSampling:
    """Return how the tokens of a request are chosen.

    Args:
        request: the request; the token ids that end its output have been checked.
        model: the verify model.
        num_prompt: number of tokens of the prompt.
        max_tokens: most tokens of output.

    Raises:
        InvalidInputError: a value is out of range, or contradicts another one; the error names the
            field.
    """
    parameters = sampling_from_proto(request.sampling, secrets.randbits(_NUM_SEED_BITS))
    _check_constraint(request, parameters)
    banned = _banned(request, model, max_tokens)
    sampling = SequenceSampling(
        parameters,
        num_prompt_tokens=num_prompt,
        min_position=num_prompt + request.min_tokens if banned else 0,
        banned_token_ids=banned,
        logprobs=_logprobs(request, num_prompt),
    )
    sampling.check_vocabulary(model.output_size)
    _check_something_allowed(sampling, model.output_size)
    return sampling


def _banned(
    request: orchestrator_pb2.GenerateRequest, model: ModelDescription, max_tokens: int
) -> tuple[int, ...]:
    """Return the tokens that may not end the output before ``min_tokens``."""
    if request.min_tokens > max_tokens:
        raise InvalidInputError(
            f"min_tokens is {request.min_tokens}: ask for max_tokens or less, which is {max_tokens}"
        )
    if not request.min_tokens:
        return ()
    ends = set(request.stop_token_ids)
    if not request.ignore_eos:
        ends.update(model.eos_token_ids)
    if len(ends) > MAX_LISTED_TOKENS:
        raise InvalidInputError(
            f"stop_token_ids has {len(ends)} entries: send at most {MAX_LISTED_TOKENS} beside "
            "min_tokens"
        )
    return tuple(sorted(ends))


def _logprobs(request: orchestrator_pb2.GenerateRequest, num_prompt: int) -> LogprobsOptions | None:
    """Return which log-probabilities the request asks for; those of a prompt fit a message."""
    if not request.HasField("logprobs"):
        return None
    options = options_from_proto(request.logprobs)
    num_each = 1 + options.num_top
    if options.has_prompt and num_prompt * num_each > MAX_PROMPT_LOGPROBS:
        raise InvalidInputError(
            f"logprobs.has_prompt asks for {num_each} log-probabilities of each of {num_prompt} "
            f"tokens, and at most {MAX_PROMPT_LOGPROBS} are returned: shorten the prompt, or lower "
            "logprobs.num_top"
        )
    return options


def _check_constraint(
    request: orchestrator_pb2.GenerateRequest, parameters: SamplingParameters
) -> None:
    """Refuse what a constrained output cannot obey, because the constraint ends it."""
    if parameters.constraint is None:
        return
    refused = {
        "ignore_eos": request.ignore_eos,
        "min_tokens": bool(request.min_tokens),
        "allowed_token_ids": bool(parameters.allowed_token_ids),
    }
    for name, is_set in refused.items():
        if is_set:
            raise InvalidInputError(
                f"{name} contradicts the constraint, which decides where the output ends and which "
                f"tokens it has: leave out {name} or the constraint"
            )


def _check_something_allowed(sampling: SequenceSampling, output_size: int) -> None:
    """Refuse bans that leave no token from the beginning on."""
    parameters = sampling.parameters
    banned = {word[0] for word in parameters.bad_words if len(word) == 1}
    banned.update(sampling.banned_token_ids)
    allowed = set(parameters.allowed_token_ids)
    num_left = len(allowed - banned) if allowed else output_size - len(banned)
    if banned and num_left <= 0:
        name = "allowed_token_ids" if allowed else "the vocabulary"
        raise InvalidInputError(
            f"bad_words and min_tokens ban all tokens of {name}: allow at least one more"
        )
