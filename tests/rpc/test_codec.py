"""Round trips through the codec, and unknown or unset fields."""

import pytest

from amusd.analysis.generation_statistics import SourceAcceptance, Statistics
from amusd.fleet.load_balancing import ReplicaState, ReplicaStatus
from amusd.fleet.model_description import CacheUsage
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.events import Advance, Branch, DeviceTime, Forward, Proposal, Rollback, Verdict
from amusd.protocol.strategy import Strategy
from amusd.rpc import codec, model_codec, statistics_codec
from amusd.v1 import draft_pb2, model_pb2, orchestrator_pb2


@pytest.mark.parametrize("source", DraftSource)
def test_a_proposal_keeps_its_source(source: DraftSource) -> None:
    steps = (DeviceTime(1 << 60, 0.125), DeviceTime((1 << 60) + 1, 0.125))
    branch = Branch(5, 9, (1, 2), source, (0.25, 0.0))
    proposal = Proposal(1, 5, (7, 8), 0.25, 2, source, 0.125, steps, (branch,), (0.5, 0.125))
    assert codec.proposal_from_proto(codec.proposal_to_proto(proposal).proposal) == proposal


def test_a_proposal_without_times_has_none_in_its_message() -> None:
    message = codec.proposal_to_proto(Proposal(1, 5, (7, 8), source=DraftSource.LOOKUP)).proposal
    assert (message.num_steps, message.draft_seconds, len(message.steps)) == (0, 0.0, 0)


@pytest.mark.parametrize(
    "advance", [Advance(1, 5, (7, 8), 4, 3), Advance(1, 5, (7,)), Advance(0, 0, (), 0, 1)]
)
def test_an_advance_keeps_what_it_asks_of_the_draft(advance: Advance) -> None:
    request = codec.advance_to_proto(advance)
    assert request.WhichOneof("step") == "advance"
    assert codec.advance_from_proto(request.advance) == advance


@pytest.mark.parametrize("rollback", [Rollback(2, 7, 9, 5, 3, 4), Rollback(2, 7, 9)])
def test_a_rollback_keeps_its_session_and_what_it_asks_of_the_draft(rollback: Rollback) -> None:
    request = codec.rollback_to_proto(rollback, "one")
    assert request.session_id == "one"
    assert codec.rollback_from_proto(request) == rollback


@pytest.mark.parametrize(
    "forward",
    [
        Forward(2, 7, (9, 8), 5),
        Forward(2, 7, ()),
        Forward(2, 7, (9, 8), 5, (Branch(7, 1, (2,), probabilities=(0.5,)),), (0.25, 1.0)),
    ],
)
def test_a_forward_keeps_its_tokens_and_its_limit(forward: Forward) -> None:
    request = codec.forward_to_proto(forward)
    assert request.WhichOneof("step") == "proposals"
    assert codec.forward_from_proto(request.proposals) == forward


@pytest.mark.parametrize("number", [0, 99])
def test_an_unknown_source_counts_as_the_model(number: int) -> None:
    message = draft_pb2.Proposal(epoch=1, position=5, token_ids=[7])
    message.source = number  # type: ignore[assignment]
    assert codec.proposal_from_proto(message).source is DraftSource.MODEL


def test_statistics_keep_the_acceptance_of_each_source() -> None:
    sources = (
        SourceAcceptance(DraftSource.MODEL, 9, 6, 4),
        SourceAcceptance(DraftSource.LOOKUP, 3),
    )
    statistics = Statistics(
        2,
        20,
        1.0,
        0.1,
        15,
        12,
        4,
        2,
        6,
        2,
        (),
        0.5,
        0.75,
        acceptance_per_source=sources,
        num_cached_prompt_tokens=1,
    )
    message = statistics_codec.statistics_to_proto(statistics, Strategy.AMUSD)
    assert statistics_codec.statistics_from_proto(message) == statistics


def test_a_verdict_keeps_its_times_and_cached_tokens() -> None:
    passes = (DeviceTime(1 << 60, 0.5),)
    verdict = Verdict(
        1, 5, 3, 2, 7, pass_seconds=0.5, device_seconds=0.25, num_cached=40, passes=passes
    )
    assert codec.verdict_from_proto(codec.verdict_to_proto(verdict).verdict) == verdict


def test_cache_usage_keeps_its_counts() -> None:
    usage = CacheUsage(
        max_tokens=1 << 40, num_reserved=5, num_retained=4, num_computed=3, num_cached=2
    )
    assert model_codec.usage_from_proto(model_codec.usage_to_proto(usage)) == usage


def test_unset_numerics_and_weight_format_are_empty() -> None:
    model = model_codec.model_from_proto(model_pb2.ModelInfo(name="any"))
    assert (model.numerics, model.weight_format) == ("", "")


@pytest.mark.parametrize("state", ReplicaState)
def test_a_replica_shows_its_state_and_its_sessions(state: ReplicaState) -> None:
    message = codec.replica_to_proto(ReplicaStatus("10.0.0.1:50052", state, 9, 4, 30, "why"))
    assert orchestrator_pb2.ReplicaState.Name(message.state) == f"REPLICA_STATE_{state.name}"
    numbers = (message.num_sessions, message.num_own_sessions, message.num_opened_sessions)
    assert numbers == (9, 4, 30)
    assert (message.address, message.reason) == ("10.0.0.1:50052", "why")
