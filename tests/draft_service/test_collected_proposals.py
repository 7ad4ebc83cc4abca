"""How many tokens the draft service collects into one proposal, and who changes it when."""

from dataclasses import replace

import pytest

from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from amusd.fleet.model_description import ServiceLimits
from amusd.protocol.draft_limits import DraftLimits
from amusd.protocol.errors import PreconditionError
from amusd.protocol.events import Advance, Proposal, Rollback
from draft_service.drafters import model_drafter
from draft_service.drafting import DraftOpening, DraftWorker

MODEL = SyntheticModel(vocabulary=50)
LIMITS = ServiceLimits(max_sessions=4, max_context=64, max_lookahead=8)
PROMPT = [1, 2, 3]
OPENING = DraftOpening("a", PROMPT, DraftLimits(lookahead=8, max_position=60))


class Session:
    """A session of a worker without other sessions, and the proposals it was sent."""

    def __init__(self, tokens_per_proposal: int) -> None:
        self.proposals: list[Proposal] = []
        self.worker = DraftWorker(
            model_drafter(SyntheticEngine(MODEL), with_ngrams=False), LIMITS, prefill_budget=100
        )
        limits = replace(OPENING.limits, tokens_per_proposal=tokens_per_proposal)
        self.worker.open(replace(OPENING, limits=limits), self.proposals.append)

    def sizes(self) -> list[int]:
        """Draft until the look-ahead is used up; return the size of each new proposal."""
        self.proposals.clear()
        while self.worker.step():
            pass
        for proposal in self.proposals:
            assert proposal.num_steps == len(proposal.tokens)
        return [len(proposal.tokens) for proposal in self.proposals]

    def accept(self, num_tokens: int, tokens_per_proposal: int = 0) -> None:
        """Make the first ``num_tokens`` of the draft's own tokens final."""
        final = tuple(own(num_tokens))
        event = Advance(0, len(PROMPT), final, tokens_per_proposal=tokens_per_proposal)
        self.worker.receive("a", event)

    def roll_back(self, tokens_per_proposal: int = 0, first_proposal: int = 0) -> None:
        """Roll back to the draft's second token."""
        rollback = Rollback(
            1, 5, 7, tokens_per_proposal=tokens_per_proposal, first_proposal=first_proposal
        )
        self.worker.rollback("a", rollback)


def own(num_tokens: int) -> list[int]:
    """What the model writes after the prompt."""
    tokens = list(PROMPT)
    for _ in range(num_tokens):
        tokens.append(MODEL.next_token(tokens))
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize(
    ("tokens_per_proposal", "sizes"), [(1, [1] * 8), (2, [2] * 4), (3, [3, 3, 2]), (8, [8])]
)
def test_a_session_collects_as_many_tokens_as_it_was_opened_with(
    tokens_per_proposal: int, sizes: list[int]
) -> None:
    session = Session(tokens_per_proposal)
    assert session.sizes() == sizes
    assert [token for one in session.proposals for token in one.tokens] == own(8)


def test_an_advance_changes_how_many_tokens_are_collected() -> None:
    session = Session(tokens_per_proposal=2)
    assert session.sizes() == [2, 2, 2, 2]
    session.accept(6, tokens_per_proposal=3)
    assert session.sizes() == [3, 3]
    session.accept(12, tokens_per_proposal=1)
    assert session.sizes() == [1] * 6


def test_an_advance_that_names_no_number_leaves_it() -> None:
    session = Session(tokens_per_proposal=2)
    session.sizes()
    session.accept(6)
    assert session.sizes() == [2, 2, 2]


def test_tokens_collected_already_leave_at_an_advance_that_asks_for_fewer() -> None:
    session = Session(tokens_per_proposal=4)
    for _ in range(6):
        session.worker.step()
    assert [len(one.tokens) for one in session.proposals] == [4]
    session.accept(1, tokens_per_proposal=2)
    assert [len(one.tokens) for one in session.proposals] == [4, 2]


def test_a_rollback_changes_how_many_tokens_are_collected() -> None:
    session = Session(tokens_per_proposal=1)
    session.sizes()
    session.roll_back(tokens_per_proposal=4)
    assert session.sizes() == [4, 4]


def test_a_rollback_that_names_no_number_leaves_it() -> None:
    session = Session(tokens_per_proposal=2)
    session.sizes()
    session.roll_back()
    assert session.sizes() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("tokens_per_proposal", "first_proposal", "sizes"),
    [(3, 1, [1, 3, 3, 1]), (0, 1, [1, 2, 2, 2, 1]), (2, 5, [5, 2, 1])],
)
def test_a_rollback_says_how_many_tokens_the_first_proposal_after_it_holds(
    tokens_per_proposal: int, first_proposal: int, sizes: list[int]
) -> None:
    session = Session(tokens_per_proposal=2)
    session.sizes()
    session.roll_back(tokens_per_proposal, first_proposal)
    assert session.sizes() == sizes
    assert {one.epoch for one in session.proposals} == {1}


def test_a_rollback_that_is_refused_changes_no_number() -> None:
    session = Session(tokens_per_proposal=2)
    with pytest.raises(PreconditionError, match="ahead of"):
        session.worker.rollback("a", Rollback(1, 9, 7, tokens_per_proposal=4, first_proposal=1))
    assert session.sizes() == [2, 2, 2, 2]
