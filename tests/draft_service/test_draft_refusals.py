"""Sessions that the draft service refuses, and sessions that fail and leave the others alone."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from amusd.engine.interface import ScheduledSequence
from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from amusd.protocol.draft_limits import DraftLimits
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.errors import (
    AmusdError,
    DuplicateSessionError,
    InvalidInputError,
    LimitExceededError,
    PreconditionError,
    UnknownSessionError,
)
from amusd.protocol.events import Advance, Rollback
from draft_service.drafters import Drafter, model_drafter
from draft_service.drafting import DraftOpening, DraftWorker
from tests.draft_service.draft_receiver import (
    LIMITS,
    OPENING,
    make_engine,
    make_ngram_worker,
    make_worker,
    named,
    opened,
    run,
    written,
)


class BreakingEngine(SyntheticEngine):
    """Fails at a text that ends with token 0."""

    def run(self, feeds: Sequence[ScheduledSequence]) -> list[list[int]]:
        if any(feed.tokens[-1] == 0 for feed in feeds):
            raise LimitExceededError("no memory left")
        return super().run(feeds)


# Limits


@pytest.mark.parametrize(
    ("opening", "error", "words"),
    [
        (replace(OPENING, tokens=[]), InvalidInputError, "send a prompt"),
        (replace(OPENING, tokens=[1, 50]), InvalidInputError, "token id 50 is outside"),
        (
            replace(OPENING, limits=DraftLimits(4, max_position=3)),
            InvalidInputError,
            "max_position 3 leaves no room after 3 tokens",
        ),
        (
            replace(OPENING, vocabulary_fingerprint="another"),
            InvalidInputError,
            "pair models that share their tokenizer",
        ),
        (
            replace(OPENING, tokens=[1] * 64, limits=DraftLimits(4, 100)),
            InvalidInputError,
            "the prompt has 64 tokens, the draft service takes fewer than 64",
        ),
        (
            replace(OPENING, limits=DraftLimits(9, 40)),
            InvalidInputError,
            "lookahead is 9: ask for 8 or less",
        ),
    ],
)
def test_an_opening_that_cannot_be_served_is_refused_and_leaves_nothing_open(
    opening: DraftOpening, error: type[AmusdError], words: str
) -> None:
    engine = make_engine()
    worker = DraftWorker(model_drafter(engine, with_ngrams=False), LIMITS, 100)
    with pytest.raises(error, match=words):
        opened(worker, opening)
    assert worker.num_sessions == engine.num_open == 0


def test_the_vocabulary_of_the_verify_model_is_accepted() -> None:
    worker = make_worker()
    fingerprint = worker.engine.description.vocabulary.fingerprint
    opened(worker, replace(OPENING, vocabulary_fingerprint=fingerprint))
    assert worker.num_sessions == 1


def test_an_ngram_lookup_takes_any_vocabulary_and_any_token() -> None:
    worker = make_ngram_worker()
    opened(worker, replace(OPENING, tokens=[10**6], vocabulary_fingerprint="another"))
    assert worker.num_sessions == 1


def test_a_session_id_can_be_open_once() -> None:
    worker = make_worker()
    opened(worker)
    with pytest.raises(DuplicateSessionError, match="'a' is open already"):
        opened(worker)


def test_the_number_of_sessions_is_limited_and_a_close_makes_room() -> None:
    engine = make_engine()
    worker = DraftWorker(model_drafter(engine, with_ngrams=False), LIMITS, 100)
    for name in "abcd":
        opened(worker, named(name))
    with pytest.raises(LimitExceededError, match="4 sessions are open"):
        opened(worker, named("e"))
    worker.close("b")
    assert worker.num_sessions == engine.num_open == 3
    opened(worker, named("e"))


# Failures


def test_a_rollback_of_a_session_that_is_not_open_is_refused() -> None:
    with pytest.raises(UnknownSessionError, match="no session 'a' is open here"):
        make_worker().rollback("a", Rollback(1, 4, 7))


def test_a_rollback_that_is_refused_leaves_the_session_as_it_was() -> None:
    worker = make_worker()
    receiver = opened(worker)
    worker.step()
    with pytest.raises(InvalidInputError, match="token id 50 is outside"):
        worker.rollback("a", Rollback(1, 4, 50))
    with pytest.raises(PreconditionError, match="ahead of"):
        worker.rollback("a", Rollback(1, 9, 7))
    run(worker)
    assert receiver.tokens == written([1, 2, 3], 4)


@pytest.mark.parametrize(
    ("advance", "words"),
    [(Advance(0, 9, (1,)), "leaves a gap"), (Advance(0, 3, (50,)), "token id 50 is outside")],
)
def test_a_session_that_fails_says_why_once_and_leaves_the_others_alone(
    advance: Advance, words: str
) -> None:
    worker = make_worker()
    failed, other = opened(worker, named("a")), opened(worker, named("b", 4, 5))
    worker.receive("a", advance)
    worker.receive("a", advance)
    run(worker)
    assert [words in str(error) for error in failed.errors] == [True]
    assert failed.proposals == []
    assert other.tokens == written([4, 5], 4)


def test_the_id_of_a_failed_session_stays_taken_until_it_is_closed() -> None:
    worker = make_worker()
    opened(worker)
    worker.receive("a", Advance(0, 9, (1,)))
    with pytest.raises(DuplicateSessionError):
        opened(worker)
    worker.close("a")
    opened(worker)


def test_a_batch_that_fails_ends_its_sessions_and_no_other() -> None:
    engine = BreakingEngine(SyntheticModel(vocabulary=50))
    worker = DraftWorker(model_drafter(engine, with_ngrams=False), LIMITS, 100)
    failed, other = opened(worker, named("a", 1, 0)), opened(worker, named("b", 4, 5))
    worker.step()
    worker.step()
    assert [str(error) for error in failed.errors] == ["no memory left"]
    assert other.tokens == written([4, 5], 1)
    assert other.errors == []


class BrokenProposer:
    """Fails when a session is rolled back, or when it proposes for ``bad``."""

    source = DraftSource.LOOKUP

    def __init__(self, where: str) -> None:
        self._where = where

    def read(self, session_id: str, tokens: list[int], most: int) -> int:
        return 0

    def propose(self, session_id: str, tokens: list[int], room: int) -> list[int]:
        if self._where == "propose" and session_id == "bad":
            raise MemoryError
        return []

    def branch(
        self, session_id: str, tokens: list[int], position: int, token: int, room: int
    ) -> list[int]:
        return []

    def truncate(self, session_id: str, length: int) -> None:
        if self._where == "truncate":
            raise KeyError(session_id)

    def close(self, session_id: str) -> None:
        pass


def test_a_rollback_that_fails_is_answered_and_ends_its_session() -> None:
    drafter = Drafter(make_engine(), (BrokenProposer("truncate"),))
    worker = DraftWorker(drafter, LIMITS, 100)
    bad, other = opened(worker, named("bad")), opened(worker, named("other"))
    run(worker)
    with pytest.raises(AmusdError, match=r"failed while rolling back this session \(KeyError\)"):
        worker.rollback("bad", Rollback(1, len(OPENING.tokens) + 1, 5))
    assert ["KeyError" in str(one) for one in bad.errors] == [True]
    assert other.errors == []


def test_a_proposer_that_fails_ends_its_session_and_no_other() -> None:
    drafter = Drafter(make_engine(), (BrokenProposer("propose"),))
    worker = DraftWorker(drafter, LIMITS, 100)
    bad, other = opened(worker, named("bad")), opened(worker, named("other"))
    run(worker)
    assert ["MemoryError" in str(one) for one in bad.errors] == [True]
    assert other.tokens == written(OPENING.tokens, 4)
