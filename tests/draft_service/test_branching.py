"""Branches: what is drafted beside the run of a session, and what comes of it at a rollback."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

import pytest

from amusd.engine.interface import NO_TOKEN
from amusd.engine.synthetic import SyntheticModel
from amusd.fleet.model_description import ServiceLimits
from amusd.observe.pass_listener import PassReport
from amusd.protocol.draft_limits import DraftLimits
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.errors import AmusdError, InternalError, InvalidInputError
from amusd.protocol.events import Advance, Branch, Proposal, Rollback
from amusd.sampling.parameters import SamplingParameters, SequenceSampling
from draft_service.drafters import model_drafter
from draft_service.drafting import DraftOpening, DraftWorker
from tests.serving.sampling_engine import SamplingEngine

MODEL = SyntheticModel(vocabulary=50, agreement=0.5, batch=5, alternatives=3)
LIMITS = ServiceLimits(max_sessions=4, max_context=100, max_lookahead=8, max_branches=16)
OPENING = DraftOpening("a", [1, 2], DraftLimits(4, 60, max_branches=16))


class Bench:
    """A draft worker whose messages are kept."""

    def __init__(self, model: SyntheticModel = MODEL, with_ngrams: bool = False) -> None:
        self.engine = SamplingEngine(model)
        self.reports: list[PassReport] = []
        self.worker = DraftWorker(
            model_drafter(self.engine, with_ngrams=with_ngrams),
            LIMITS,
            100,
            on_pass=self.reports.append,
            clock=itertools.count().__next__,  # each step takes as long, whatever its rows
        )
        self.sent: list[Proposal | AmusdError] = []

    def open(self, opening: DraftOpening = OPENING) -> None:
        self.worker.open(opening, self.sent.append)

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Step until nothing is left to do, or until something is reached."""
        for _ in range(500):
            if until() or not self.worker.step():
                self.worker.step()  # what a last batch made ready is sent before the next one
                return
        raise AssertionError("the worker does not come to rest")

    @property
    def sent_branches(self) -> list[Branch]:
        return [one for sent in self.sent if isinstance(sent, Proposal) for one in sent.branches]

    @property
    def branches(self) -> list[Branch]:
        """Each branch as it came last."""
        return list({one.root: one for one in self.sent_branches}.values())

    @property
    def run_tokens(self) -> dict[int, int]:
        """The tokens of all proposals of the last epoch by position."""
        proposals = [one for one in self.sent if isinstance(one, Proposal)]
        epoch = max((one.epoch for one in proposals), default=0)
        return {
            position: token
            for one in proposals
            if one.epoch == epoch
            for position, token in enumerate(one.tokens, one.position)
        }


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_branches_hang_on_other_tokens_and_go_on_as_the_model_does(bench: Bench) -> None:
    bench.open()
    bench.run()
    assert len(bench.branches) == 12  # four tokens with three alternatives each
    for branch in bench.branches:
        before = [1, 2, *(bench.run_tokens[position] for position in range(2, branch.position))]
        assert branch.token in MODEL.next_best(before)
        context = [*before, branch.token]
        for token in branch.tokens:
            assert token == MODEL.next_token(context)
            context.append(token)


def test_a_branch_comes_again_with_further_tokens(bench: Bench) -> None:
    bench.open()
    bench.run()
    known: dict[tuple[int, int], tuple[int, ...]] = {}
    for branch in bench.sent_branches:
        before = known.get(branch.root, ())
        assert branch.tokens[: len(before)] == before
        assert len(branch.tokens) > len(before)
        known[branch.root] = branch.tokens
    assert len(bench.sent_branches) > len(known)


def test_likelier_branches_become_longer(bench: Bench) -> None:
    bench.open()
    bench.run(until=lambda: len(bench.branches) >= 8)
    lengths = [len(branch.tokens) for branch in bench.branches]
    assert lengths[0] > lengths[-1] >= 1


def test_a_branch_leaves_after_the_token_that_it_hangs_on(bench: Bench) -> None:
    bench.open()
    bench.run()
    end = 2
    for proposal in bench.sent:
        assert isinstance(proposal, Proposal)
        end = max(end, proposal.position + len(proposal.tokens))
        assert all(branch.position < end for branch in proposal.branches)


def test_after_a_rollback_to_a_branch_the_run_goes_on_behind_it(bench: Bench) -> None:
    bench.open()
    bench.run()
    branch = max(bench.branches, key=lambda one: (one.position == 3, len(one.tokens)))
    rollback = Rollback(1, branch.position + 1, branch.token, branch_tokens=branch.tokens)
    bench.worker.receive("a", Advance(0, 2, (bench.run_tokens[2],)))
    bench.sent.clear()
    bench.worker.rollback("a", rollback)
    bench.run()
    session = bench.worker.sequence("a").session
    start = branch.position + 1
    assert tuple(session.tokens[start : start + len(branch.tokens)]) == branch.tokens
    # What the orchestrator has is not proposed again.
    assert all(position >= start + len(branch.tokens) for position in bench.run_tokens or [99])


def test_a_branch_that_was_not_taken_in_time_is_proposed_at_once(bench: Bench) -> None:
    bench.open()
    bench.run()
    branch = next(one for one in bench.branches if one.position == 2)
    bench.sent.clear()
    bench.worker.rollback("a", Rollback(1, 3, branch.token, tokens_per_proposal=1))
    [proposal] = bench.sent
    assert isinstance(proposal, Proposal)
    assert (proposal.epoch, proposal.position) == (1, 3)
    assert proposal.tokens == branch.tokens


def test_branches_of_a_branch_are_prepared_from_the_alternatives_of_its_tokens(
    bench: Bench,
) -> None:
    bench.open()
    bench.run()
    branch = next(one for one in bench.branches if one.position == 2)
    bench.sent.clear()
    bench.worker.rollback("a", Rollback(1, 3, branch.token, branch_tokens=branch.tokens))
    bench.run()
    assert {one.position for one in bench.branches} >= {3, 4}


def test_the_time_of_branches_counts_for_their_session(bench: Bench) -> None:
    bench.open()
    bench.run()
    times = bench.worker.sequence("a").clock.take()
    proposals = [one for one in bench.sent if isinstance(one, Proposal)]
    shares = [*(one.device_seconds for one in proposals), times.share_seconds]
    assert sum(shares) == pytest.approx(sum(one.seconds for one in bench.reports))
    # Batches of branches alone are no steps of the session.
    with_run = [one for one in bench.reports if one.num_tokens > one.num_branch_tokens]
    assert len(with_run) < len(bench.reports)
    assert sum(one.num_steps for one in proposals) == len(with_run)
    steps_seconds = sum(one.draft_seconds for one in proposals)
    assert steps_seconds == pytest.approx(sum(one.seconds for one in with_run))


def test_branches_are_no_sessions_of_a_batch(bench: Bench) -> None:
    bench.open()
    bench.open(replace(OPENING, session_id="b"))
    bench.run()
    assert {one.num_sessions for one in bench.reports} <= {1, 2}
    for report in bench.reports:
        share = report.num_branch_tokens / report.num_tokens
        assert report.branch_seconds == pytest.approx(report.seconds * share)
    assert any(one.num_branch_tokens for one in bench.reports)


def test_a_branch_that_its_session_cannot_hold_leaves_nothing_behind_its_rollback(
    bench: Bench,
) -> None:
    bench.open()
    brancher = bench.worker.sequence("a").brancher
    assert brancher is not None

    def drafting() -> list[tuple[int, int]]:
        found = [one.branch for one in brancher._sequences if one.branch is not None]
        return [(one.position, one.token) for one in found if one.depth >= 2]

    bench.run(until=lambda: bool(drafting()))
    position, token = drafting()[0]
    final = [*(bench.run_tokens[one] for one in range(2, position)), token]
    # The session learns that its run is wrong before it learns where it goes on.
    bench.worker.receive("a", Advance(0, 2, tuple(final)))
    bench.sent.clear()
    bench.worker.rollback("a", Rollback(1, position + 1, token))
    bench.run()
    assert bench.branches
    before = [1, 2, *final]
    for branch in bench.branches:
        run = [bench.run_tokens[one] for one in range(position + 1, branch.position)]
        assert branch.token in MODEL.next_best([*before, *run])


def test_what_followed_a_next_best_token_before_is_a_branch_that_takes_no_place() -> None:
    bench = Bench(replace(MODEL, batch=1), with_ngrams=True)
    # The synthetic model looks at the position and the last two tokens.
    token = MODEL.next_best([5, 6] * 4)[0]
    prompt = [5, 6, token, 7, 8, 9, 5, 6]
    bench.open(replace(OPENING, tokens=prompt))
    bench.run(until=lambda: bool(bench.branches))
    [branch] = bench.branches
    assert branch == Branch(8, token, (7, 8, 9, 5), DraftSource.LOOKUP)
    assert not any(one.num_branch_tokens for one in bench.reports)
    bench.worker.rollback("a", Rollback(1, 9, token, branch_tokens=branch.tokens))
    bench.run(until=lambda: bench.worker.sequence("a").session.length > 13)
    session = bench.worker.sequence("a").session
    assert session.tokens[:13] == [*prompt, token, 7, 8, 9, 5]


def test_without_a_limit_for_branches_in_the_opening_there_are_none(bench: Bench) -> None:
    bench.open(replace(OPENING, limits=DraftLimits(4, 60)))
    bench.run()
    assert not bench.branches


def test_a_full_batch_leaves_no_place_for_branches() -> None:
    bench = Bench(replace(MODEL, batch=1))
    bench.open()
    bench.run(until=lambda: len(bench.run_tokens) == 4)
    assert not bench.branches


def test_where_rows_have_cost_too_much_the_session_drafts_alone(bench: Bench) -> None:
    for num_tokens in (1, 2, 5) * 30:
        bench.worker._drafting.passed(PassReport(0.01 * num_tokens, 1, num_tokens))
        bench.worker._drafting.stepped(0.01 * num_tokens)
    bench.open()
    bench.run(until=lambda: len(bench.run_tokens) == 4)
    assert len(bench.reports) == 4
    assert not any(one.num_branch_tokens for one in bench.reports)


def test_the_memory_of_branches_is_free_again_when_their_session_closes(bench: Bench) -> None:
    bench.open()
    bench.run()
    assert bench.engine.num_open > 1
    bench.worker.close("a")
    assert bench.engine.num_open == 0


def test_without_memory_for_branches_a_session_drafts_alone() -> None:
    bench = Bench(replace(MODEL, memory=60))
    bench.open()
    bench.run()
    assert len(bench.run_tokens) == 4
    assert not bench.branches


def test_a_branch_sequence_whose_pass_fails_is_given_up_and_its_session_goes_on(
    bench: Bench,
) -> None:
    run, main_slot = bench.engine.run, 1

    def fails_for_branches(batch: list) -> list:  # type: ignore[type-arg]
        if any(one.slot != main_slot for one in batch):
            raise MemoryError
        return run(batch)

    bench.engine.run = fails_for_branches  # type: ignore[assignment,method-assign]
    bench.open()
    bench.run()
    assert len(bench.run_tokens) == 4
    assert not bench.branches
    assert bench.engine.num_open == 1


@pytest.mark.parametrize("where", ["schedule", "hand_over"])
def test_a_fault_in_branching_ends_its_own_session_only(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    bench.open()
    others: list[Proposal | AmusdError] = []
    bench.worker.open(replace(OPENING, session_id="b"), others.append)

    def fails(*arguments: object) -> NoReturn:
        raise KeyError(arguments)

    brancher = bench.worker.sequence("a").brancher
    assert brancher is not None
    owner = brancher if where == "schedule" else brancher.plan
    monkeypatch.setattr(owner, where, fails)
    bench.run()
    assert isinstance(bench.sent[-1], InternalError)
    assert all(isinstance(one, Proposal) for one in others)
    assert any(one.branches for one in others if isinstance(one, Proposal))


def test_a_branch_without_a_finite_token_ends_alone(bench: Bench) -> None:
    run, main_slot = bench.engine.run, 1

    def broken_for_branches(batch: list) -> list:  # type: ignore[type-arg]
        outputs = run(batch)
        return [
            found if one.slot == main_slot else [NO_TOKEN] * len(found)
            for one, found in zip(batch, outputs, strict=True)
        ]

    bench.engine.run = broken_for_branches  # type: ignore[assignment,method-assign]
    bench.open()
    bench.run()
    assert len(bench.run_tokens) == 4
    assert not bench.branches


# Sampling


def test_a_session_and_its_branches_are_sampled_alike() -> None:
    bench = Bench()
    sampling = SequenceSampling(SamplingParameters(temperature=0.5, seed=7), 2)
    bench.open(replace(OPENING, sampling=sampling))
    bench.run()
    assert bench.sent_branches
    assert len(bench.engine.opened) > 1
    assert set(bench.engine.opened) == {sampling}


def test_sampling_with_tokens_outside_the_vocabulary_is_refused() -> None:
    sampling = SequenceSampling(SamplingParameters(allowed_token_ids=(50,)), 2)
    with pytest.raises(InvalidInputError, match="allowed_token_ids: token id 50 is outside"):
        Bench().open(replace(OPENING, sampling=sampling))
