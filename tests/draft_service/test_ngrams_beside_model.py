"""N-gram lookup and a model in one drafter: which of them drafts, and what the model computes."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amusd.engine.interface import ScheduledSequence
from amusd.engine.synthetic import SyntheticModel
from amusd.fleet.model_description import ServiceLimits
from amusd.policy.source_selection import SourceTracker
from amusd.protocol.draft_limits import DraftLimits
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.errors import AmusdError
from amusd.protocol.events import Advance, Proposal, Rollback
from draft_service.drafters import Drafter, model_drafter, ngram_drafter
from draft_service.drafting import DraftOpening, DraftWorker
from tests.counting import CountingEngine

MODEL, LOOKUP = DraftSource.MODEL, DraftSource.LOOKUP
LIMITS = ServiceLimits(max_sessions=4, max_context=200, max_lookahead=8)
REPEATING = [1, 2, 3, 4, 5, 9, 1, 2, 3]
NEW = [1, 2, 3, 4, 5]


class LoggingEngine(CountingEngine):
    """Logs its batches among the messages of a service."""

    def __init__(self, model: SyntheticModel, log: list[str]) -> None:
        super().__init__(model)
        self._log = log

    def run(self, feeds: Sequence[ScheduledSequence]) -> list[list[int]]:
        self._log.append(f"batch of {len(feeds)}")
        return super().run(feeds)


class Service:
    """A worker with a model and n-gram lookup. Logs proposals, handovers and batches in order."""

    def __init__(
        self,
        prefill_budget: int = 100,
        batch: int = 3,
        vocabulary: int = 100,
        with_ngrams: bool = True,
    ) -> None:
        self.model = SyntheticModel(vocabulary=vocabulary, batch=batch)
        self.log: list[str] = []
        self.engine = LoggingEngine(self.model, self.log)
        drafter = model_drafter(self.engine, with_ngrams)
        self.worker = DraftWorker(drafter, LIMITS, prefill_budget)
        self.worker.flush = lambda: self.log.append("flush")
        self.proposals: dict[str, list[Proposal]] = {}

    def open(
        self, tokens: list[int], lookahead: int, name: str = "a", records_times: bool = False
    ) -> None:
        sent = self.proposals[name] = []

        def send(message: Proposal | AmusdError) -> None:
            assert isinstance(message, Proposal)
            sent.append(message)
            self.log.append(f"{message.source.value} of {name}")

        limits = DraftLimits(lookahead, max_position=150)
        opening = DraftOpening(name, list(tokens), limits, records_times=records_times)
        self.worker.open(opening, send)

    def drafted(self, name: str = "a") -> list[tuple[int, DraftSource, tuple[int, ...]]]:
        return [(one.position, one.source, one.tokens) for one in self.proposals[name]]

    def next_token(self, *tokens: int) -> int:
        """What the model writes after ``tokens``."""
        return self.model.next_token(tokens)

    def tracker(self, name: str = "a") -> SourceTracker:
        return self.worker.sequence(name).session.tracker

    def run(self) -> None:
        while self.worker.step():
            pass


# Who drafts


def test_where_the_last_three_tokens_occurred_before_no_batch_of_the_model_is_needed() -> None:
    service = Service()
    service.open(REPEATING, lookahead=2, records_times=True)
    assert not service.worker.step()
    assert service.drafted() == [(9, LOOKUP, (4, 5))]
    assert service.engine.passes == []
    [proposal] = service.proposals["a"]
    assert (proposal.num_steps, proposal.steps) == (0, ())
    assert proposal.draft_seconds == proposal.device_seconds == 0


@pytest.mark.parametrize("tokens", [NEW, [1, 2, 70, 9, 1, 2], [1]])
def test_elsewhere_the_model_drafts(tokens: list[int]) -> None:
    service = Service()
    service.open(tokens, lookahead=1)
    assert service.worker.step()
    assert service.drafted() == [(len(tokens), MODEL, (service.next_token(*tokens),))]
    [proposal] = service.proposals["a"]
    assert proposal.num_steps == 1
    assert not service.worker.step()


def test_the_model_catches_up_on_looked_up_tokens_in_one_batch() -> None:
    service = Service()
    service.open(NEW, lookahead=2)
    service.worker.step()
    service.worker.rollback("a", Rollback(1, 6, corrected_token=9))
    service.worker.receive("a", Advance(1, 6, (1, 2, 3)))
    service.proposals["a"].clear()
    assert not service.worker.step()
    service.worker.receive("a", Advance(1, 9, (4, 5, 60)))
    assert service.worker.step()
    expected = service.next_token(*NEW, 9, 1, 2, 3, 4, 5, 60)
    assert service.drafted() == [(9, LOOKUP, (4, 5)), (12, MODEL, (expected,))]
    assert service.engine.sizes() == [[5], [7]]


@pytest.mark.parametrize(
    ("num_wrong", "sources", "expected"),
    [
        ({}, {MODEL, LOOKUP}, (LOOKUP, (4, 5))),
        ({MODEL: 48}, {LOOKUP}, (LOOKUP, (4, 5))),
        ({LOOKUP: 8}, {MODEL}, (MODEL, (SyntheticModel(vocabulary=100).next_token(REPEATING),))),
        ({MODEL: 48, LOOKUP: 49}, set(), (LOOKUP, ())),
    ],
)
def test_only_sources_that_may_draft_are_asked(
    num_wrong: dict[DraftSource, int],
    sources: set[DraftSource],
    expected: tuple[DraftSource, tuple[int, ...]],
) -> None:
    service = Service()
    service.open(REPEATING, lookahead=2)
    for source, num in num_wrong.items():
        for _ in range(num):
            service.tracker().compared(source, is_right=False)
    assert service.worker.sequence("a").session.sources == sources
    source, tokens = expected
    assert service.worker.step() is (source is MODEL)
    assert service.drafted() == [(9, source, tokens)]
    assert len(service.engine.passes) == (source is MODEL)


def test_without_a_match_and_without_the_model_there_is_nothing_to_propose() -> None:
    service = Service()
    service.open(NEW, lookahead=4)
    for _ in range(48):
        service.tracker().compared(MODEL, is_right=False)
    assert not service.worker.step()
    assert service.drafted() == [(5, LOOKUP, ())]
    assert service.engine.passes == []


@pytest.mark.parametrize(
    ("source", "drafter"),
    [
        (LOOKUP, ngram_drafter()),
        (MODEL, model_drafter(CountingEngine(SyntheticModel(vocabulary=100)), with_ngrams=False)),
    ],
)
def test_a_single_source_drafts_even_where_it_does_not_pay(
    source: DraftSource, drafter: Drafter
) -> None:
    worker = DraftWorker(drafter, LIMITS, prefill_budget=100)
    sent: list[Proposal] = []
    worker.open(DraftOpening("a", REPEATING, DraftLimits(1, 50)), sent.append)
    session = worker.sequence("a").session
    for _ in range(48):
        session.tracker.compared(source, is_right=False)
    assert source not in session.sources
    worker.step()
    expected = 4 if source is LOOKUP else SyntheticModel(vocabulary=100).next_token(REPEATING)
    assert [(one.source, one.tokens) for one in sent] == [(source, (expected,))]


def test_a_lookup_that_was_off_knows_the_tokens_written_since() -> None:
    service = Service()
    service.open(NEW, lookahead=2)
    for _ in range(8):
        service.tracker().compared(LOOKUP, is_right=False)
    service.worker.step()
    assert [one.source for one in service.proposals["a"]] == [MODEL]
    service.worker.rollback("a", Rollback(1, 6, corrected_token=1))
    service.worker.receive("a", Advance(1, 6, (2, 3)))
    for _ in range(50):
        service.tracker().compared(LOOKUP, is_right=True)
    service.proposals["a"].clear()
    assert not service.worker.step()
    assert service.drafted() == [(8, LOOKUP, (4, 5))]


@dataclass
class ConstantProposer:
    """Proposes the same tokens everywhere, and remembers who asked."""

    tokens: list[int]
    asked: list[str]
    source = LOOKUP

    def read(self, session_id: str, tokens: list[int], most: int) -> int:
        return 0

    def propose(self, session_id: str, tokens: list[int], room: int) -> list[int]:
        self.asked.append(session_id)
        return self.tokens[:room]

    def branch(
        self, session_id: str, tokens: list[int], position: int, token: int, room: int
    ) -> list[int]:
        return []

    def truncate(self, session_id: str, length: int) -> None:
        """Nothing is kept."""

    def close(self, session_id: str) -> None:
        """Nothing is kept."""


def test_proposers_are_asked_in_order_until_one_has_something_to_propose() -> None:
    asked: list[list[str]] = [[], [], []]
    proposers = tuple(
        ConstantProposer(tokens, who) for tokens, who in zip(([], [7], [8]), asked, strict=True)
    )
    engine = CountingEngine(SyntheticModel(vocabulary=100))
    worker = DraftWorker(Drafter(engine, proposers), LIMITS, prefill_budget=100)
    sent: list[Proposal] = []
    worker.open(DraftOpening("a", [1, 2], DraftLimits(1, 50)), sent.append)
    assert not worker.step()
    assert [(one.position, one.tokens) for one in sent] == [(2, (7,))]
    assert asked == [["a"], ["a"], []]


# Batches


def test_the_model_computes_a_long_prompt_before_anything_is_looked_up() -> None:
    service = Service(prefill_budget=4)
    service.open(REPEATING, lookahead=2, records_times=True)
    for _ in range(2):
        assert service.worker.step()
        assert service.drafted() == []
    assert not service.worker.step()
    assert service.drafted() == [(9, LOOKUP, (4, 5))]
    assert service.engine.sizes() == [[4], [4]]
    [proposal] = service.proposals["a"]
    assert proposal.num_steps == len(proposal.steps) == 2  # the chunks of its prompt


def test_a_batch_takes_the_sessions_without_a_match() -> None:
    service = Service()
    for name, tokens in (("a", NEW), ("b", REPEATING), ("c", [7, 8])):
        service.open(tokens, lookahead=1, name=name)
    assert service.worker.step()
    assert service.drafted("a") == [(5, MODEL, (service.next_token(*NEW),))]
    assert service.drafted("b") == [(9, LOOKUP, (4,))]
    assert service.drafted("c") == [(2, MODEL, (service.next_token(7, 8),))]
    assert service.engine.sizes() == [[5, 2]]


def test_looked_up_tokens_leave_before_the_batch_of_the_other_sessions() -> None:
    service = Service()
    for name, tokens in (("a", NEW), ("b", REPEATING)):
        service.open(tokens, lookahead=1, name=name)
    assert service.worker.step()
    assert service.log == ["lookup of b", "flush", "batch of 1", "model of a"]


def test_without_looked_up_tokens_nothing_is_handed_over_before_a_batch() -> None:
    service = Service()
    service.open(NEW, lookahead=1)
    service.worker.step()
    assert service.log == ["batch of 1", "model of a"]


def test_the_time_of_batches_of_others_is_not_charged_to_looked_up_tokens() -> None:
    service = Service()
    service.open(NEW, lookahead=1, name="a")
    service.open(REPEATING, lookahead=1, name="b")
    service.worker.step()
    service.worker.receive("b", Advance(0, 9, (4,)))
    service.worker.step()
    assert service.drafted("b") == [(9, LOOKUP, (4,)), (10, LOOKUP, (5,))]
    assert [(one.num_steps, one.draft_seconds) for one in service.proposals["b"]] == [(0, 0)] * 2


# Sessions that end or roll back


def test_a_session_is_closed_in_the_engine_and_in_the_index() -> None:
    service = Service()
    service.open(REPEATING, lookahead=2, name="a")
    service.open([9, 1, 2, 3], lookahead=1, name="b")
    service.worker.step()
    service.worker.close("a")
    assert service.engine.num_open == 1
    assert service.drafted("b") == [(4, MODEL, (service.next_token(9, 1, 2, 3),))]
    again = [9, 8, 7, 1, 2, 3]
    service.open(again, lookahead=1, name="a")
    service.worker.step()
    assert service.drafted("a") == [(6, MODEL, (service.next_token(*again),))]


texts = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@given(texts, texts, st.integers(1, 5), st.integers(1, 8), st.booleans(), st.data())
@settings(deadline=None)
def test_after_a_rollback_model_and_lookup_draft_as_fresh_ones_do(
    prompt: list[int],
    corrections: list[int],
    prefill_budget: int,
    lookahead: int,
    with_ngrams: bool,
    data: st.DataObject,
) -> None:
    service = Service(prefill_budget, vocabulary=3, with_ngrams=with_ngrams)
    service.open(prompt, lookahead)
    session = service.worker.sequence("a").session
    num_verified = len(prompt)
    for epoch, token in enumerate(corrections, start=1):
        for _ in range(data.draw(st.integers(0, 6), label="steps")):
            service.worker.step()
        num_verified = data.draw(st.integers(num_verified, session.length), label="kept") + 1
        service.worker.rollback("a", Rollback(epoch, num_verified, token))
        service.proposals["a"].clear()
        if data.draw(st.booleans(), label="compares"):
            fresh = Service(vocabulary=3, with_ngrams=with_ngrams)
            fresh.open(session.tokens, lookahead)
            fresh.worker.sequence("a").session.tracker = copy.deepcopy(session.tracker)
            service.run()
            fresh.run()
            assert service.drafted() == fresh.drafted()
            assert sum(len(tokens) for *_, tokens in service.drafted()) == lookahead
