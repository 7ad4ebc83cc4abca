"""The slots of a draft service: no slot, index or place in the queue outlives its session."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from amusd.engine.interface import EngineOptions
from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from amusd.fleet.model_description import ServiceLimits
from amusd.protocol.draft_limits import DraftLimits
from amusd.protocol.errors import AmusdError, LimitExceededError
from amusd.protocol.events import Rollback
from draft_service.drafters import Drafter, model_drafter, ngram_drafter
from draft_service.drafting import DraftOpening, DraftWorker
from draft_service.ngram_index import BYTES_PER_TOKEN

LIMITS = ServiceLimits(max_sessions=6, max_context=2000, max_lookahead=4, max_waiting=2)
MEMORY = (1 << 20) // BYTES_PER_TOKEN  # tokens of the cache
TEXT = [1, 2, 3, 4] * 400


def with_model(reuses: bool) -> Drafter:
    model = SyntheticModel(vocabulary=50, memory=MEMORY, context=2000, batch=2)
    options = EngineOptions(reuse_prefixes=reuses)
    return model_drafter(SyntheticEngine(model, options=options), with_ngrams=True)


DRAFTERS = {
    "lookup alone": lambda: ngram_drafter(EngineOptions(cache_mib=1)),
    "model and lookup": lambda: with_model(reuses=True),
    "no reuse": lambda: with_model(reuses=False),
}


class AnyOrder(RuleBasedStateMachine):
    """Open, draft, roll back, give up and close in any order."""

    make_drafter: Any

    def __init__(self) -> None:
        super().__init__()
        self.drafter: Drafter = self.make_drafter()
        self.worker = DraftWorker(self.drafter, LIMITS, prefill_budget=64)
        self.open_names: list[str] = []
        self.num_opened = 0

    @rule(length=st.sampled_from([1, 20, 400, 1500]), more=st.integers(1, 100))
    def open(self, length: int, more: int) -> None:
        self.num_opened += 1
        name = f"{self.num_opened}"
        limits = DraftLimits(4, length + more)
        try:
            self.worker.open(DraftOpening(name, TEXT[:length], limits), lambda _: None)
        except LimitExceededError:
            return
        self.open_names.append(name)

    @rule(num_steps=st.integers(1, 5))
    def draft(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.worker.step()

    @precondition(lambda self: self.open_names)
    @rule(data=st.data(), token=st.integers(1, 4))
    def roll_back(self, data: st.DataObject, token: int) -> None:
        name = data.draw(st.sampled_from(self.open_names))
        session = self.worker.sequence(name).session
        position = data.draw(st.integers(session._verified, session.length))
        try:
            self.worker.rollback(name, Rollback(session.epoch + 1, position + 1, token))
        except AmusdError:
            assert position + 1 > session.length

    @precondition(lambda self: self.open_names)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        self.worker.give_up(data.draw(st.sampled_from(self.open_names)))

    @precondition(lambda self: self.open_names)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.open_names))
        self.worker.close(name)
        self.open_names.remove(name)

    @invariant()
    def what_is_held_belongs_to_open_sessions(self) -> None:
        self.worker._scheduler.check_integrity()
        engine: Any = self.drafter.engine
        cache = engine._cache if self.drafter.has_model else engine._slots
        cache.check_integrity()
        sequences = [self.worker.sequence(name) for name in self.open_names]
        with_slot = [one for one in sequences if one.slot is not None]
        assert engine.num_open == len(with_slot) == len({one.slot for one in with_slot})
        assert engine.usage.num_reserved == sum(one.capacity for one in with_slot)
        for proposer in self.drafter.proposers:
            indices: dict[str, Any] = proposer._indices  # type: ignore[attr-defined]
            assert indices.keys() <= set(self.open_names)

    def teardown(self) -> None:
        for name in list(self.open_names):
            self.worker.close(name)
        self.open_names.clear()
        self.what_is_held_belongs_to_open_sessions()
        assert not self.worker.step()


@pytest.mark.parametrize("kind", DRAFTERS)
def test_a_draft_service_loses_nothing_in_any_order_of_opening_and_closing(kind: str) -> None:
    class Case(AnyOrder):
        make_drafter = staticmethod(DRAFTERS[kind])

    laws = settings(max_examples=40, stateful_step_count=25, deadline=None)
    run_state_machine_as_test(Case, settings=laws)
