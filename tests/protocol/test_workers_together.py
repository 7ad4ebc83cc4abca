"""The services' own workers and the orchestrator's ledgers, many sessions on one thread."""

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from amusd.fleet.model_description import ServiceLimits
from amusd.protocol.draft_limits import DraftLimits
from amusd.protocol.errors import AmusdError
from amusd.protocol.events import Advance, Proposal, Verdict
from amusd.protocol.ledger import Ledger
from amusd.protocol.strategy import Strategy, draft_plan
from draft_service.drafters import Drafter, model_drafter, ngram_drafter
from draft_service.drafting import DraftOpening, DraftWorker
from tests.protocol.parts import Orchestrator
from tests.protocol.scenario import VOCABULARY, Setup, verify_models_own
from verify_service.verifying import VerifyOpening, VerifyWorker

LIMITS = ServiceLimits(max_sessions=4, max_context=64, max_lookahead=8, max_waiting=4)


class Workers:
    """Both services, each with an engine for all sessions."""

    def __init__(
        self,
        seed: int,
        agreement: float | None,
        batch: int,
        prefill: int,
        lookup: bool,
        memory: int,
    ) -> None:
        """Start; an ``agreement`` of None drafts by n-gram lookup alone."""
        model = SyntheticModel(VOCABULARY, seed, batch=batch, memory=memory)
        drafter: Drafter = ngram_drafter()
        if agreement is not None:
            draft_engine = SyntheticEngine(replace(model, agreement=agreement))
            drafter = model_drafter(draft_engine, with_ngrams=lookup)
        self.engine = SyntheticEngine(model)
        self.draft = DraftWorker(drafter, LIMITS, prefill)
        self.verify = VerifyWorker(self.engine, LIMITS, prefill)


class Conversation:
    """One session with both workers."""

    def __init__(self, name: str, setup: Setup, workers: Workers) -> None:
        self.setup = setup
        self.core = Orchestrator(setup, Ledger(setup.prompt))
        self._name = name
        self._workers = workers
        self._inbox: list[Proposal | Verdict | AmusdError] = []
        verifying = VerifyOpening(name, setup.prompt, setup.max_position)
        workers.verify.open(verifying, self._inbox.append)
        plan = draft_plan(setup.strategy, setup.lookahead)
        if plan is not None:
            limits = DraftLimits(plan.lookahead, setup.max_position, plan.tokens_per_proposal)
            workers.draft.open(DraftOpening(name, setup.prompt, limits), self._inbox.append)

    @property
    def is_over(self) -> bool:
        return self.core.reason is not None

    def take_one(self) -> bool:
        """Take the next message, and send what follows from it; return whether there was one."""
        if not self._inbox:
            return False
        message = self._inbox.pop(0)
        if isinstance(message, AmusdError):
            raise message
        if isinstance(message, Verdict):
            self.core.on_verdict(message)
        else:
            self.core.on_proposal(message)
        while self.core.forwards:
            self._workers.verify.receive(self._name, self.core.forwards.popleft())
        while self.core.outgoing:
            step = self.core.outgoing.popleft()
            if isinstance(step, Advance):
                self._workers.draft.receive(self._name, step)
            else:
                self._workers.draft.rollback(self._name, step)
        return True

    def close(self) -> None:
        self._workers.verify.close(self._name)
        if self.setup.strategy is not Strategy.AUTOREGRESSIVE:
            self._workers.draft.close(self._name)


@given(
    strategies=st.lists(st.sampled_from(Strategy), min_size=1, max_size=4),
    agreement=st.none() | st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    lookahead=st.integers(1, 8),
    batch=st.integers(1, 4),
    prefill_tokens=st.integers(1, 4),
    lookup=st.booleans(),
    memory=st.sampled_from([0, 30, 60]),  # for any number of sessions, for 1 or 2
    seed=st.integers(0, 2**16),
)
@settings(max_examples=100, deadline=None)
def test_sessions_side_by_side_each_get_the_verify_models_own_tokens(
    strategies: list[Strategy],
    agreement: float | None,
    lookahead: int,
    batch: int,
    prefill_tokens: int,
    lookup: bool,
    memory: int,
    seed: int,
) -> None:
    workers = Workers(seed, agreement, batch, prefill_tokens, lookup, memory)
    conversations = [
        Conversation(
            str(number), Setup(strategy, lookahead, num_prompt=number + 1, seed=seed), workers
        )
        for number, strategy in enumerate(strategies)
    ]
    converse(workers, conversations, random.Random(seed))
    for conversation in conversations:
        assert conversation.core.output == verify_models_own(conversation.setup)
    assert workers.engine.num_open == workers.verify.num_sessions == workers.draft.num_sessions == 0
    assert workers.verify.num_waiting == workers.draft.num_waiting == 0


def converse(workers: Workers, conversations: list[Conversation], chance: random.Random) -> None:
    """Let the parts act in random order until all sessions are over."""
    going = list(conversations)
    while going:
        conversation = chance.choice(going)
        turns = [workers.draft.step, workers.verify.step, conversation.take_one]
        chance.shuffle(turns)
        if not any(turn() for turn in turns):
            assert any(other.take_one() for other in going), "nothing can happen any more"
        for over in [it for it in going if it.is_over]:
            over.close()
            going.remove(over)
