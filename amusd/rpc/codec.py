"""Conversions between protobuf messages and the types of the pure packages."""

from amusd.fleet.load_balancing import ReplicaState, ReplicaStatus
from amusd.protocol import events
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.finish import FinishReason
from amusd.protocol.strategy import Strategy
from amusd.rpc.sampling_codec import logprobs_from_proto, logprobs_to_proto
from amusd.v1 import draft_pb2, model_pb2, orchestrator_pb2, verify_pb2

_STRATEGIES = {
    orchestrator_pb2.STRATEGY_AUTOREGRESSIVE: Strategy.AUTOREGRESSIVE,
    orchestrator_pb2.STRATEGY_SPECULATIVE: Strategy.SPECULATIVE,
    orchestrator_pb2.STRATEGY_AMUSD: Strategy.AMUSD,
}
_STRATEGY_NUMBERS = {strategy: number for number, strategy in _STRATEGIES.items()}
_FINISH_REASONS = {
    orchestrator_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    orchestrator_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}
_FINISH_NUMBERS = {reason: number for number, reason in _FINISH_REASONS.items()}
_SOURCE_NUMBERS = {
    source: model_pb2.DraftSource.Value(f"DRAFT_SOURCE_{source.name}") for source in DraftSource
}
_SOURCES = {number: source for source, number in _SOURCE_NUMBERS.items()}
_REPLICA_STATES = {
    ReplicaState.AWAY: orchestrator_pb2.REPLICA_STATE_AWAY,
    ReplicaState.HEALTHY: orchestrator_pb2.REPLICA_STATE_HEALTHY,
    ReplicaState.DRAINING: orchestrator_pb2.REPLICA_STATE_DRAINING,
    ReplicaState.REFUSED: orchestrator_pb2.REPLICA_STATE_REFUSED,
}


def strategy_to_proto(strategy: Strategy) -> orchestrator_pb2.Strategy.ValueType:
    """Return the enum value of a strategy."""
    return _STRATEGY_NUMBERS[strategy]


def strategy_from_proto(number: int, default: Strategy) -> Strategy:
    """Return the strategy of an enum value; STRATEGY_UNSPECIFIED gives ``default``.

    Raises:
        InvalidInputError: the value is unknown.
    """
    if number == orchestrator_pb2.STRATEGY_UNSPECIFIED:
        return default
    for known, strategy in _STRATEGIES.items():
        if known == number:
            return strategy
    names = ", ".join(orchestrator_pb2.Strategy.Name(known) for known in _STRATEGIES)
    raise InvalidInputError(f"unknown strategy {number}: use {names}")


def finish_reason_to_proto(reason: FinishReason) -> orchestrator_pb2.FinishReason.ValueType:
    """Return the enum value of a finish reason."""
    return _FINISH_NUMBERS[reason]


def finish_reason_from_proto(number: orchestrator_pb2.FinishReason.ValueType) -> FinishReason:
    """Return the finish reason of an enum value."""
    return _FINISH_REASONS[number]


def source_to_proto(source: DraftSource) -> model_pb2.DraftSource.ValueType:
    """Return the enum value of a draft source."""
    return _SOURCE_NUMBERS[source]


def source_from_proto(number: model_pb2.DraftSource.ValueType) -> DraftSource:
    """Return the draft source of an enum value; an unknown value counts as the model."""
    return _SOURCES.get(number, DraftSource.MODEL)


def time_to_proto(time: events.DeviceTime) -> model_pb2.DeviceTime:
    """Return the message of a device time."""
    return model_pb2.DeviceTime(started_unix_nanos=time.started_unix_nanos, seconds=time.seconds)


def time_from_proto(time: model_pb2.DeviceTime) -> events.DeviceTime:
    """Return the device time of a message."""
    return events.DeviceTime(time.started_unix_nanos, time.seconds)


def branch_to_proto(branch: events.Branch) -> model_pb2.Branch:
    """Return the message of a branch."""
    return model_pb2.Branch(
        position=branch.position,
        token_id=branch.token,
        token_ids=branch.tokens,
        source=source_to_proto(branch.source),
        probabilities=branch.probabilities,
    )


def branch_from_proto(branch: model_pb2.Branch) -> events.Branch:
    """Return the branch of a message."""
    return events.Branch(
        branch.position,
        branch.token_id,
        tuple(branch.token_ids),
        source_from_proto(branch.source),
        tuple(branch.probabilities),
    )


def proposal_to_proto(proposal: events.Proposal) -> draft_pb2.ProposeResponse:
    """Return the draft service's response that carries a proposal."""
    return draft_pb2.ProposeResponse(
        proposal=draft_pb2.Proposal(
            epoch=proposal.epoch,
            position=proposal.position,
            token_ids=proposal.tokens,
            draft_seconds=proposal.draft_seconds,
            num_steps=proposal.num_steps,
            source=source_to_proto(proposal.source),
            device_seconds=proposal.device_seconds,
            steps=[time_to_proto(step) for step in proposal.steps],
            branches=[branch_to_proto(branch) for branch in proposal.branches],
            probabilities=proposal.probabilities,
        )
    )


def proposal_from_proto(proposal: draft_pb2.Proposal) -> events.Proposal:
    """Return the proposal of a message."""
    return events.Proposal(
        epoch=proposal.epoch,
        position=proposal.position,
        tokens=tuple(proposal.token_ids),
        draft_seconds=proposal.draft_seconds,
        num_steps=proposal.num_steps,
        source=source_from_proto(proposal.source),
        device_seconds=proposal.device_seconds,
        steps=tuple(time_from_proto(step) for step in proposal.steps),
        branches=tuple(branch_from_proto(branch) for branch in proposal.branches),
        probabilities=tuple(proposal.probabilities),
    )


def verdict_to_proto(verdict: events.Verdict) -> verify_pb2.VerifyResponse:
    """Return the verify service's response that carries a verdict."""
    return verify_pb2.VerifyResponse(
        verdict=verify_pb2.Verdict(
            epoch=verdict.epoch,
            position=verdict.position,
            num_checked=verdict.num_checked,
            num_accepted=verdict.num_accepted,
            next_token_id=verdict.next_token,
            pass_seconds=verdict.pass_seconds,
            device_seconds=verdict.device_seconds,
            num_cached_tokens=verdict.num_cached,
            passes=[time_to_proto(one) for one in verdict.passes],
            logprobs=logprobs_to_proto(verdict.logprobs),
            prompt_logprobs=logprobs_to_proto(verdict.prompt_logprobs),
        )
    )


def verdict_from_proto(verdict: verify_pb2.Verdict) -> events.Verdict:
    """Return the verdict of a message."""
    return events.Verdict(
        epoch=verdict.epoch,
        position=verdict.position,
        num_checked=verdict.num_checked,
        num_accepted=verdict.num_accepted,
        next_token=verdict.next_token_id,
        pass_seconds=verdict.pass_seconds,
        device_seconds=verdict.device_seconds,
        num_cached=verdict.num_cached_tokens,
        passes=tuple(time_from_proto(one) for one in verdict.passes),
        logprobs=logprobs_from_proto(verdict.logprobs),
        prompt_logprobs=logprobs_from_proto(verdict.prompt_logprobs),
    )


def forward_to_proto(forward: events.Forward) -> verify_pb2.VerifyRequest:
    """Return the verify service's request that carries proposed tokens."""
    return verify_pb2.VerifyRequest(
        proposals=verify_pb2.VerifyProposals(
            epoch=forward.epoch,
            position=forward.position,
            token_ids=forward.tokens,
            max_checked=forward.max_checked,
            branches=[branch_to_proto(branch) for branch in forward.branches],
            probabilities=forward.probabilities,
        )
    )


def advance_to_proto(advance: events.Advance) -> draft_pb2.ProposeRequest:
    """Return the draft service's request that carries final tokens."""
    return draft_pb2.ProposeRequest(
        advance=draft_pb2.ProposeAdvance(
            epoch=advance.epoch,
            position=advance.position,
            token_ids=advance.tokens,
            lookahead=advance.lookahead,
            tokens_per_proposal=advance.tokens_per_proposal,
        )
    )


def rollback_to_proto(rollback: events.Rollback, session_id: str) -> draft_pb2.RollbackRequest:
    """Return the draft service's request for a rollback of a session."""
    return draft_pb2.RollbackRequest(
        session_id=session_id,
        epoch=rollback.epoch,
        verified_position=rollback.verified_position,
        corrected_token_id=rollback.corrected_token,
        lookahead=rollback.lookahead,
        tokens_per_proposal=rollback.tokens_per_proposal,
        first_proposal=rollback.first_proposal,
        branch_token_ids=rollback.branch_tokens,
    )


def forward_from_proto(message: verify_pb2.VerifyProposals) -> events.Forward:
    """Return tokens to check from their message."""
    return events.Forward(
        message.epoch,
        message.position,
        tuple(message.token_ids),
        message.max_checked,
        tuple(branch_from_proto(branch) for branch in message.branches),
        tuple(message.probabilities),
    )


def advance_from_proto(message: draft_pb2.ProposeAdvance) -> events.Advance:
    """Return final tokens from their message."""
    return events.Advance(
        message.epoch,
        message.position,
        tuple(message.token_ids),
        message.lookahead,
        message.tokens_per_proposal,
    )


def rollback_from_proto(message: draft_pb2.RollbackRequest) -> events.Rollback:
    """Return a rollback from its message, without its session."""
    return events.Rollback(
        message.epoch,
        message.verified_position,
        message.corrected_token_id,
        message.lookahead,
        message.tokens_per_proposal,
        message.first_proposal,
        tuple(message.branch_token_ids),
    )


def replica_to_proto(replica: ReplicaStatus) -> orchestrator_pb2.Replica:
    """Return the message of a replica's status."""
    return orchestrator_pb2.Replica(
        address=replica.address,
        state=_REPLICA_STATES[replica.state],
        num_sessions=replica.num_sessions,
        num_own_sessions=replica.num_own,
        num_opened_sessions=replica.num_opened,
        reason=replica.reason,
    )
