"""The codec of what services tell about themselves: models, limits, and the KV cache."""

from amusd.fleet.model_description import CacheUsage, ModelDescription, ServiceLimits
from amusd.fleet.vocabulary import Vocabulary
from amusd.v1 import model_pb2


def model_to_proto(model: ModelDescription) -> model_pb2.ModelInfo:
    """Return the message of a model description."""
    return model_pb2.ModelInfo(
        name=model.name,
        device=model.device,
        dtype=model.dtype,
        num_parameters=model.num_parameters,
        context_length=model.context_length,
        output_size=model.output_size,
        vocabulary=model_pb2.Vocabulary(
            size=model.vocabulary.size,
            fingerprint=model.vocabulary.fingerprint,
            block_hashes=model.vocabulary.block_hashes,
        ),
        eos_token_ids=model.eos_token_ids,
        tokenizer=model.tokenizer,
        numerics=model.numerics,
        weight_format=model.weight_format,
        weights_fingerprint=model.weights_fingerprint,
        runner=model.runner,
        runner_reason=model.runner_reason,
    )


def model_from_proto(info: model_pb2.ModelInfo) -> ModelDescription:
    """Return the model description of a message."""
    return ModelDescription(
        name=info.name,
        device=info.device,
        dtype=info.dtype,
        num_parameters=info.num_parameters,
        context_length=info.context_length,
        output_size=info.output_size,
        vocabulary=Vocabulary(
            size=info.vocabulary.size,
            fingerprint=info.vocabulary.fingerprint,
            block_hashes=tuple(info.vocabulary.block_hashes),
        ),
        eos_token_ids=tuple(info.eos_token_ids),
        tokenizer=info.tokenizer,
        numerics=info.numerics,
        weight_format=info.weight_format,
        weights_fingerprint=info.weights_fingerprint,
        runner=info.runner,
        runner_reason=info.runner_reason,
    )


def limits_to_proto(limits: ServiceLimits) -> model_pb2.ServiceLimits:
    """Return the message of service limits."""
    return model_pb2.ServiceLimits(
        max_sessions=limits.max_sessions,
        max_context=limits.max_context,
        max_lookahead=limits.max_lookahead,
        max_waiting=limits.max_waiting,
        max_branches=limits.max_branches,
    )


def limits_from_proto(limits: model_pb2.ServiceLimits) -> ServiceLimits:
    """Return the service limits of a message."""
    return ServiceLimits(
        max_sessions=limits.max_sessions,
        max_context=limits.max_context,
        max_lookahead=limits.max_lookahead,
        max_waiting=limits.max_waiting,
        max_branches=limits.max_branches,
    )


def usage_to_proto(usage: CacheUsage) -> model_pb2.CacheUsage:
    """Return the message of the use of a KV cache."""
    return model_pb2.CacheUsage(
        max_tokens=usage.max_tokens,
        num_reserved_tokens=usage.num_reserved,
        num_retained_tokens=usage.num_retained,
        num_computed_tokens=usage.num_computed,
        num_cached_tokens=usage.num_cached,
    )


def usage_from_proto(usage: model_pb2.CacheUsage) -> CacheUsage:
    """Return the use of a KV cache from its message."""
    return CacheUsage(
        max_tokens=usage.max_tokens,
        num_reserved=usage.num_reserved_tokens,
        num_retained=usage.num_retained_tokens,
        num_computed=usage.num_computed_tokens,
        num_cached=usage.num_cached_tokens,
    )
