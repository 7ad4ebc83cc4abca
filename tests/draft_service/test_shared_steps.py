"""Draft sessions that share batches, prompts and memory."""

from dataclasses import replace

import pytest

from amusd.engine.synthetic import SyntheticModel
from amusd.fleet.model_description import ServiceLimits
from amusd.protocol.draft_limits import DraftLimits
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.errors import AmusdError, CacheFullError
from amusd.protocol.events import Advance, Proposal, Rollback
from draft_service.drafters import model_drafter
from draft_service.drafting import DraftOpening, DraftWorker
from tests.counting import CountingEngine

MODEL = SyntheticModel(vocabulary=500, batch=8)
LIMITS = ServiceLimits(max_sessions=16, max_context=2000, max_lookahead=8, max_waiting=2)
SYSTEM = [token % 400 for token in range(1000)]


class Client:
    """A session, and what it was sent."""

    def __init__(self, worker: DraftWorker, name: str, prompt: list[int], ahead: int = 1) -> None:
        self.proposals: list[Proposal] = []
        self.errors: list[AmusdError] = []
        self.prompt = prompt
        limits = DraftLimits(ahead, len(prompt) + 20)
        worker.open(DraftOpening(name, prompt, limits), self._take)

    def _take(self, message: Proposal | AmusdError) -> None:
        if isinstance(message, Proposal):
            self.proposals.append(message)
        else:
            self.errors.append(message)

    @property
    def sent(self) -> list[tuple[int, int, tuple[int, ...]]]:
        return [(one.epoch, one.position, one.tokens) for one in self.proposals]


def own(prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(MODEL.next_token(tokens))
    return tokens[len(prompt) :]


def run(worker: DraftWorker) -> None:
    while worker.step():
        pass


def make(
    prefill_budget: int = 256, with_ngrams: bool = False, **settings: int
) -> tuple[CountingEngine, DraftWorker]:
    engine = CountingEngine(replace(MODEL, **settings))
    return engine, DraftWorker(model_drafter(engine, with_ngrams), LIMITS, prefill_budget)


# Time and prompts


def test_a_shared_step_is_whole_as_latency_and_divided_as_use_of_the_device() -> None:
    _, worker = make(pass_ms=5)
    clients = [Client(worker, str(size), list(range(size))) for size in (1, 3)]
    run(worker)
    short, long = (client.proposals[0] for client in clients)
    assert short.num_steps == long.num_steps == 1
    assert short.draft_seconds == long.draft_seconds >= 0.005
    assert short.device_seconds + long.device_seconds == pytest.approx(short.draft_seconds)
    assert long.device_seconds == pytest.approx(3 * short.device_seconds)


def test_a_long_prompt_is_computed_in_chunks() -> None:
    engine, worker = make(prefill_budget=2)
    client = Client(worker, "a", [1, 2, 3, 4, 5])
    for num_chunks in (1, 2):
        assert worker.step()
        assert (len(engine.passes), client.sent) == (num_chunks, [])
    run(worker)
    assert engine.sizes() == [[2], [2], [1]]
    assert client.sent == [(0, 5, tuple(own(client.prompt, 1)))]


def test_a_long_prompt_does_not_block_sessions_that_draft() -> None:
    engine, worker = make(prefill_budget=50)
    drafting = Client(worker, "drafting", [1], ahead=8)
    worker.step()
    for number in range(3):
        Client(worker, str(number), [400 + number, *SYSTEM[:149]])
    for _ in range(5):
        worker.step()
    assert len(drafting.proposals) == 6
    assert all(1 in sizes and sum(sizes) - 1 <= 50 for sizes in engine.sizes()[1:])
    prefill = [[feed.slot for feed in feeds if feed.is_prompt] for feeds in engine.passes[1:]]
    assert prefill == [[2], [3], [4], [2], [3]]


def test_more_sessions_than_a_batch_takes_are_all_drafted_round_robin() -> None:
    _, worker = make(prefill_budget=20, batch=2)
    for number in range(4):
        Client(worker, f"prefill {number}", [400 + number, *SYSTEM[:199]])
    drafting = [Client(worker, f"drafting {number}", [number], ahead=8) for number in range(2)]
    for _ in range(12):
        worker.step()
    assert all(len(client.proposals) >= 3 for client in drafting)


@pytest.mark.parametrize("with_ngrams", [False, True])
def test_a_system_prompt_that_eight_prompts_share_is_computed_once(with_ngrams: bool) -> None:
    engine, worker = make(with_ngrams=with_ngrams)
    # The last tokens occur nowhere before, so n-gram lookup finds nothing.
    prompts = [[*SYSTEM, 450 + number, 460 + number] for number in range(8)]
    clients = [Client(worker, str(number), prompt) for number, prompt in enumerate(prompts)]
    run(worker)
    assert sum(map(sum, engine.sizes())) <= len(SYSTEM) + 8 * (2 + 16)
    for client in clients:
        assert client.sent == [(0, 1002, tuple(own(client.prompt, 1)))]
    assert engine.usage.hit_rate > 0.8


def test_ngram_lookup_beside_batches_of_the_model_costs_no_time() -> None:
    engine, worker = make(with_ngrams=True, pass_ms=5)
    drafting = Client(worker, "drafting", [4, 5, 6, 7])
    looking = Client(worker, "looking", [1, 2, 3, 9, 1, 2, 3])
    run(worker)
    [looked_up], [drafted] = looking.proposals, drafting.proposals
    assert (looked_up.source, looked_up.tokens) == (DraftSource.LOOKUP, (9,))
    assert looked_up.draft_seconds == looked_up.device_seconds == looked_up.num_steps == 0
    assert drafted.device_seconds == drafted.draft_seconds >= 0.005
    assert engine.sizes() == [[4]]


# Memory


def waiting_beside_another(worker: DraftWorker) -> Client:
    Client(worker, "first", [1, 2])
    return Client(worker, "second", [3, 4], ahead=3)


def test_a_session_that_waits_for_memory_says_that_it_has_nothing_to_propose() -> None:
    _, worker = make(memory=30)
    client = waiting_beside_another(worker)
    assert client.sent == [(0, 2, ())]
    worker.receive("second", Advance(0, 2, (7,)))
    worker.receive("second", Advance(0, 3, (8, 9)))
    assert client.sent[1:] == [(0, 3, ()), (0, 5, ())]
    run(worker)
    assert len(client.proposals) == 3
    assert (worker.num_sessions, worker.num_waiting) == (1, 1)


def test_a_session_that_gets_memory_drafts_from_where_it_is() -> None:
    engine, worker = make(memory=30)
    client = waiting_beside_another(worker)
    worker.receive("second", Advance(0, 2, (7,)))
    worker.rollback("second", Rollback(1, 4, 8))
    worker.close("first")
    run(worker)
    drafted = own([3, 4, 7, 8], 3)
    assert client.sent[3:] == [(1, 4 + place, (drafted[place],)) for place in range(3)]
    worker.close("second")
    assert engine.usage.num_reserved == worker.num_sessions == 0


def test_a_session_that_waits_for_memory_can_be_rolled_back() -> None:
    _, worker = make(memory=30)
    client = waiting_beside_another(worker)
    assert worker.rollback("second", Rollback(1, 3, 8)) == 0
    assert client.sent[-1] == (1, 3, ())


def test_a_session_that_waited_too_long_is_refused_and_makes_way() -> None:
    _, worker = make(memory=30)
    second = waiting_beside_another(worker)
    third = Client(worker, "third", [5, 6])
    worker.give_up("second")
    assert [type(error) for error in second.errors] == [CacheFullError]
    worker.close("second")
    worker.close("first")
    run(worker)
    assert third.sent == [(0, 2, ()), (0, 2, tuple(own([5, 6], 1)))]
