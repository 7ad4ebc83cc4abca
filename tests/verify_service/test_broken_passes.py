"""A pass in which the model computes NaN ends the sessions that need that token, and no other."""

from collections.abc import Sequence
from dataclasses import replace

from amusd.engine.interface import NO_TOKEN, ScheduledSequence
from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from amusd.protocol.errors import NotFiniteError
from amusd.protocol.events import Forward
from tests.verify_service.test_verifying import LIMITS, OPENING, Receiver, written
from verify_service.verifying import VerifyWorker

BAD = 49
MODEL = SyntheticModel(vocabulary=50, batch=4)


class BrokenAfter(SyntheticEngine):
    """Computes NaN from token ``BAD`` on."""

    def run(self, batch: Sequence[ScheduledSequence]) -> list[list[int]]:
        return [
            [
                NO_TOKEN if BAD in self._seen(one, index, len(outputs)) else token
                for index, token in enumerate(outputs)
            ]
            for one, outputs in zip(batch, super().run(batch), strict=True)
        ]

    def _seen(self, one: ScheduledSequence, index: int, num_outputs: int) -> list[int]:
        return self._cache[one.slot][: self.length(one.slot) - num_outputs + index + 1]


def make_worker() -> VerifyWorker:
    return VerifyWorker(BrokenAfter(MODEL), LIMITS, prefill_budget=100)


def opened(worker: VerifyWorker, name: str, *tokens: int) -> Receiver:
    receiver = Receiver()
    worker.open(replace(OPENING, session_id=name, tokens=list(tokens)), receiver)
    return receiver


def test_only_the_session_whose_token_is_missing_fails() -> None:
    worker = make_worker()
    good, bad = opened(worker, "good", 1, 2, 3), opened(worker, "bad", 1, BAD, 3)
    worker.step()
    [error] = bad.errors
    assert isinstance(error, NotFiniteError)
    assert "computed NaN or infinity" in str(error)
    assert not bad.verdicts
    assert [verdict.next_token for verdict in good.verdicts] == written(MODEL, [1, 2, 3], 1)
    worker.receive("good", Forward(0, 4, ()))
    assert worker.step()
    assert len(good.verdicts) == 2
    assert not good.errors
    worker.close("bad")
    worker.close("good")
    assert worker.num_sessions == 0


def test_a_wrong_proposal_that_breaks_the_model_is_only_rejected() -> None:
    worker = make_worker()
    receiver = opened(worker, "a", 1, 2, 3)
    first, second = written(MODEL, [1, 2, 3], 2)
    worker.receive("a", Forward(0, 3, (first, BAD, 5)))
    worker.step()
    [verdict] = receiver.verdicts
    assert (verdict.num_accepted, verdict.next_token) == (1, second)
    assert not receiver.errors


def test_what_a_broken_session_computed_is_not_reused() -> None:
    worker = make_worker()
    prompt = [BAD, *range(36)]
    opened(worker, "a", *prompt)
    worker.step()
    assert worker.num_sessions == 1
    worker.close("a")
    assert worker.engine.usage.num_retained == 0
