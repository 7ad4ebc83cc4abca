"""How a draft session counts its sources, on prompt 10 11: output begins at position 2."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.protocol.draft_limits import DraftLimits
from amusd.protocol.draft_session import DraftSession
from amusd.protocol.draft_source import ALL_SOURCES, DraftSource
from amusd.protocol.events import DraftedRun
from tests.protocol.refusal import refused

MODEL, LOOKUP = DraftSource.MODEL, DraftSource.LOOKUP


def make(lookahead: int = 4, max_position: int = 100, tokens_per_proposal: int = 1) -> DraftSession:
    return DraftSession([10, 11], DraftLimits(lookahead, max_position, tokens_per_proposal))


@pytest.fixture
def session() -> DraftSession:
    return make()


@pytest.fixture
def mixed() -> DraftSession:
    """It has proposed 20 of the model, 21 22 looked up, and 23 of the model."""
    session = make()
    for source, tokens in ((MODEL, (20,)), (LOOKUP, (21, 22)), (MODEL, (23,))):
        session.extend(tokens, source)
        session.take_run()
    return session


def counted(session: DraftSession) -> dict[DraftSource, tuple[int, int]]:
    """How many tokens of each source were compared, and how many were right."""
    return {
        source: (counts.num_checked, counts.num_accepted)
        for source, counts in session.tracker.counts.items()
    }


def test_a_run_says_what_wrote_it(session: DraftSession) -> None:
    session.extend((20,), LOOKUP)
    assert session.take_run() == DraftedRun(0, 2, (20,), LOOKUP)
    session.extend((21,))
    assert session.take_run() == DraftedRun(0, 3, (21,), MODEL)


def test_word_that_there_is_no_more_says_what_was_asked_last(session: DraftSession) -> None:
    session.extend((), LOOKUP)
    assert session.take_run() == DraftedRun(0, 2, (), LOOKUP)


def test_any_source_may_draft_unless_tokens_wait_to_be_sent() -> None:
    session = make(tokens_per_proposal=3)
    assert session.sources == ALL_SOURCES
    session.extend((20,), LOOKUP)
    assert session.sources == {LOOKUP}
    session.extend((21, 22), LOOKUP)
    session.take_run()
    assert session.sources == ALL_SOURCES


def test_tokens_of_two_sources_in_one_proposal_are_refused() -> None:
    session = make(tokens_per_proposal=3)
    session.extend((20,), LOOKUP)
    with refused(session, "tokens of the model cannot follow tokens of the lookup"):
        session.extend((21,), MODEL)


def test_an_advance_counts_what_was_right_by_source(mixed: DraftSession) -> None:
    mixed.advance(0, 2, (20, 21))
    assert counted(mixed) == {MODEL: (1, 1), LOOKUP: (1, 1)}


def test_an_advance_counts_the_first_wrong_token_and_none_after_it(mixed: DraftSession) -> None:
    mixed.advance(0, 2, (20, 31, 32, 33))
    assert counted(mixed) == {MODEL: (1, 1), LOOKUP: (1, 0)}


def test_a_rollback_after_that_counts_nothing_twice(mixed: DraftSession) -> None:
    mixed.advance(0, 2, (20, 31, 32, 33))
    mixed.rollback(1, 4, 31)
    mixed.advance(1, 4, (32, 33))
    assert counted(mixed) == {MODEL: (1, 1), LOOKUP: (1, 0)}


def test_a_rollback_counts_what_was_right_before_it_and_the_wrong_token(
    mixed: DraftSession,
) -> None:
    mixed.rollback(1, 5, 32)
    assert counted(mixed) == {MODEL: (1, 1), LOOKUP: (2, 1)}


def test_a_corrected_token_that_was_drafted_is_right(mixed: DraftSession) -> None:
    mixed.rollback(1, 5, 22)
    assert counted(mixed) == {MODEL: (1, 1), LOOKUP: (2, 2)}


def test_a_rollback_to_where_nothing_was_drafted_counts_what_there_is(mixed: DraftSession) -> None:
    mixed.rollback(1, 7, 24)
    assert counted(mixed) == {MODEL: (2, 2), LOOKUP: (2, 2)}


def test_final_tokens_that_were_taken_over_count_for_no_source(session: DraftSession) -> None:
    session.advance(0, 2, (20, 21))
    assert counted(session) == {MODEL: (0, 0), LOOKUP: (0, 0)}


def test_a_source_that_does_not_pay_may_not_draft(session: DraftSession) -> None:
    for epoch in range(8):
        assert session.sources == ALL_SOURCES
        session.extend((20,), LOOKUP)
        session.take_run()
        session.rollback(epoch + 1, 3 + epoch, 30)
    assert session.sources == {MODEL}


class Reference:
    """Draws what happens to a session, and counts by what the truth is."""

    def __init__(self, data: st.DataObject) -> None:
        self.session = make(lookahead=6, max_position=60, tokens_per_proposal=1)
        self.counts = {source: [0, 0] for source in DraftSource}
        self._data = data
        self._truth = [10, 11]  # what the verify model has written so far
        self._told = 2  # how much of it the session was told in this epoch
        self._drafted: dict[int, tuple[int, DraftSource]] = {}  # in this epoch, not compared yet
        self._wrong: int | None = None  # where the draft is known to be wrong

    def draft(self) -> None:
        source = self._data.draw(st.sampled_from(DraftSource))
        num_tokens = min(self._data.draw(st.integers(0, 3)), self.session.room)
        tokens = tuple(self._data.draw(st.integers(0, 1)) for _ in range(num_tokens))
        for position, token in enumerate(tokens, self.session.length):
            self._drafted[position] = token, source
        if self.session.room:
            self.session.extend(tokens, source)
            self.session.take_run()

    def advance(self) -> None:
        if len(self._truth) < 50:
            self._truth += self._data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=3))
        start = self._data.draw(st.integers(2, self._told))  # tokens may come again
        self.session.advance(self.session.epoch, start, tuple(self._truth[start:]))
        self._settle(len(self._truth))

    def stale_advance(self) -> None:
        if self.session.epoch:
            self.session.advance(self.session.epoch - 1, self._told, (0, 1, 0))

    def roll_back(self) -> None:
        """As the ledger does: to the first wrong token, as soon as the truth shows it."""
        last = max(self._drafted, default=0)
        while len(self._truth) <= last and self._first_wrong() is None:
            self._truth.append(self._data.draw(st.integers(0, 1)))
        position = self._first_wrong()
        if position is None:
            return
        self._settle(position + 1)
        self.session.rollback(self.session.epoch + 1, position + 1, self._truth[position])
        self._told, self._wrong = position + 1, None
        self._drafted.clear()

    def _first_wrong(self) -> int | None:
        if self._wrong is not None:
            return self._wrong
        known = (at for at in sorted(self._drafted) if at < len(self._truth))
        return next((at for at in known if self._drafted[at][0] != self._truth[at]), None)

    def _settle(self, end: int) -> None:
        while self._wrong is None and self._told < end:
            at = self._told
            if at in self._drafted:
                token, source = self._drafted.pop(at)
                self.counts[source][0] += 1
                self.counts[source][1] += token == self._truth[at]
                if token != self._truth[at]:
                    self._wrong = at
                    return
            self._told += 1


@given(st.data(), st.lists(st.sampled_from(["draft", "advance", "stale_advance", "roll_back"])))
def test_each_token_is_counted_once_when_its_position_becomes_final(
    data: st.DataObject, moves: list[str]
) -> None:
    reference = Reference(data)
    for move in moves:
        getattr(reference, move)()
        reference.session.check_integrity()
        assert counted(reference.session) == {
            source: tuple(counts) for source, counts in reference.counts.items()
        }
