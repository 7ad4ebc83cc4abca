"""The codec of a generation's statistics, which completions carry."""

from amusd.analysis.generation_statistics import PositionAcceptance, SourceAcceptance, Statistics
from amusd.protocol.strategy import Strategy
from amusd.rpc import codec
from amusd.v1 import orchestrator_pb2


def statistics_to_proto(statistics: Statistics, strategy: Strategy) -> orchestrator_pb2.Statistics:
    """Return the message of a generation's statistics."""
    return orchestrator_pb2.Statistics(
        num_prompt_tokens=statistics.num_prompt_tokens,
        num_output_tokens=statistics.num_output_tokens,
        wall_seconds=statistics.wall_seconds,
        time_to_first_token_seconds=statistics.time_to_first_token_seconds,
        num_passes=statistics.num_passes,
        num_drafted=statistics.num_drafted,
        num_accepted=statistics.num_accepted,
        num_rejected=statistics.num_rejected,
        num_wasted=statistics.num_wasted,
        num_rollbacks=statistics.num_rollbacks,
        tokens_per_pass=statistics.tokens_per_pass,
        acceptance_rate=statistics.acceptance_rate,
        acceptance_per_position=[
            orchestrator_pb2.PositionAcceptance(
                num_checked=each.num_checked, num_accepted=each.num_accepted
            )
            for each in statistics.acceptance_per_position
        ],
        draft_busy_seconds=statistics.draft_busy_seconds,
        verify_busy_seconds=statistics.verify_busy_seconds,
        strategy=codec.strategy_to_proto(strategy),
        fallback_reason=statistics.fallback_reason,
        acceptance_per_source=[
            orchestrator_pb2.SourceAcceptance(
                source=codec.source_to_proto(one.source),
                num_drafted=one.num_drafted,
                num_checked=one.num_checked,
                num_accepted=one.num_accepted,
            )
            for one in statistics.acceptance_per_source
        ],
        num_cached_prompt_tokens=statistics.num_cached_prompt_tokens,
        num_branches=statistics.num_branches,
        num_branch_hits=statistics.num_branch_hits,
        num_in_passes=statistics.num_in_passes,
    )


def statistics_from_proto(statistics: orchestrator_pb2.Statistics) -> Statistics:
    """Return the statistics of a message."""
    return Statistics(
        num_prompt_tokens=statistics.num_prompt_tokens,
        num_output_tokens=statistics.num_output_tokens,
        wall_seconds=statistics.wall_seconds,
        time_to_first_token_seconds=statistics.time_to_first_token_seconds,
        num_passes=statistics.num_passes,
        num_drafted=statistics.num_drafted,
        num_accepted=statistics.num_accepted,
        num_rejected=statistics.num_rejected,
        num_wasted=statistics.num_wasted,
        num_rollbacks=statistics.num_rollbacks,
        acceptance_per_position=tuple(
            PositionAcceptance(each.num_checked, each.num_accepted)
            for each in statistics.acceptance_per_position
        ),
        draft_busy_seconds=statistics.draft_busy_seconds,
        verify_busy_seconds=statistics.verify_busy_seconds,
        fallback_reason=statistics.fallback_reason,
        acceptance_per_source=tuple(
            SourceAcceptance(
                codec.source_from_proto(one.source),
                one.num_drafted,
                one.num_checked,
                one.num_accepted,
            )
            for one in statistics.acceptance_per_source
        ),
        num_cached_prompt_tokens=statistics.num_cached_prompt_tokens,
        num_branches=statistics.num_branches,
        num_branch_hits=statistics.num_branch_hits,
        num_in_passes=statistics.num_in_passes,
    )
