"""What the codec makes of messages of services that say less, or more, than this one."""

import pytest

from amusd.core.draft_sources import DraftSource
from amusd.core.events import Proposal
from amusd.core.statistics import SourceAcceptance, Statistics
from amusd.core.strategy import Strategy
from amusd.rpc import codec
from amusd.v1 import draft_pb2


@pytest.mark.parametrize("source", DraftSource)
def test_a_proposal_keeps_its_source(source: DraftSource) -> None:
    proposal = Proposal(1, 5, (7, 8), 0.25, 2, source)
    assert codec.proposal_from_proto(codec.proposal_to_proto(proposal).proposal) == proposal


@pytest.mark.parametrize("number", [0, 99])
def test_a_source_that_is_not_known_here_counts_as_the_model(number: int) -> None:
    message = draft_pb2.Proposal(epoch=1, position=5, token_ids=[7])
    message.source = number  # type: ignore[assignment]
    assert codec.proposal_from_proto(message).source is DraftSource.MODEL


def test_statistics_keep_what_each_source_has_done() -> None:
    sources = (
        SourceAcceptance(DraftSource.MODEL, 9, 6, 4),
        SourceAcceptance(DraftSource.LOOKUP, 3),
    )
    statistics = Statistics(
        2, 20, 1.0, 0.1, 15, 12, 4, 2, 6, 2, (), 0.5, 0.75, acceptance_per_source=sources
    )
    message = codec.statistics_to_proto(statistics, Strategy.AMUSD)
    assert codec.statistics_from_proto(message) == statistics
