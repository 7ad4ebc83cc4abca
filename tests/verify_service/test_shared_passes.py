"""Verify sessions that share passes, prompts and memory."""

from dataclasses import replace

import pytest

from amusd.engine.synthetic import SyntheticModel
from amusd.fleet.model_description import ServiceLimits
from amusd.protocol.errors import AmusdError, CacheFullError
from amusd.protocol.events import Forward, Verdict
from tests.counting import CountingEngine
from verify_service.verifying import VerifyOpening, VerifyWorker

MODEL = SyntheticModel(vocabulary=500, batch=8)
LIMITS = ServiceLimits(max_sessions=16, max_context=2000, max_lookahead=8, max_waiting=2)
SYSTEM = [token % 400 for token in range(1000)]


class Client:
    """A session, and what it was sent."""

    def __init__(self, worker: VerifyWorker, name: str, prompt: list[int], room: int = 20) -> None:
        self.verdicts: list[Verdict] = []
        self.errors: list[AmusdError] = []
        self.name = name
        self.prompt = prompt
        self._worker = worker
        worker.open(VerifyOpening(name, prompt, len(prompt) + room), self._take)

    def _take(self, message: Verdict | AmusdError) -> None:
        if isinstance(message, Verdict):
            self.verdicts.append(message)
        else:
            self.errors.append(message)

    def ask(self) -> None:
        """Request a pass without proposals after the final tokens."""
        self._worker.receive(self.name, Forward(0, len(self.prompt) + len(self.verdicts), ()))

    @property
    def tokens(self) -> list[int]:
        return [verdict.next_token for verdict in self.verdicts]


def own(prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(MODEL.next_token(tokens))
    return tokens[len(prompt) :]


def run(worker: VerifyWorker) -> None:
    while worker.step():
        pass


def make(prefill_tokens: int = 256, **settings: int) -> tuple[CountingEngine, VerifyWorker]:
    engine = CountingEngine(replace(MODEL, **settings))
    return engine, VerifyWorker(engine, LIMITS, prefill_tokens)


# Time


def test_a_shared_pass_is_whole_as_latency_and_divided_as_use_of_the_device() -> None:
    _, worker = make(pass_ms=5)
    clients = [Client(worker, str(size), list(range(size))) for size in (1, 3)]
    run(worker)
    short, long = (client.verdicts[0] for client in clients)
    assert short.pass_seconds == long.pass_seconds >= 0.005
    assert short.device_seconds + long.device_seconds == pytest.approx(short.pass_seconds)
    assert long.device_seconds == pytest.approx(3 * short.device_seconds)


def test_the_shares_of_all_sessions_add_up_to_the_time_of_the_passes() -> None:
    engine, worker = make(prefill_tokens=64, pass_ms=1)
    clients = [Client(worker, str(number), [number, *range(100)]) for number in range(4)]
    run(worker)
    used = sum(client.verdicts[0].device_seconds for client in clients)
    assert used >= 0.001 * len(engine.passes)
    # The last one took part in fewer passes than there were.
    assert used <= sum(client.verdicts[0].pass_seconds for client in clients)


# Prompts


def test_a_pass_computes_no_more_prompt_tokens_than_its_budget_and_decodes_beside_it() -> None:
    engine, worker = make(prefill_tokens=50)
    decoding = [Client(worker, f"decoding {number}", [number]) for number in range(3)]
    run(worker)
    engine.passes.clear()
    for number in range(3):
        Client(worker, f"prefill {number}", [400 + number, *SYSTEM[:149]])
    for _ in range(9):
        for client in decoding:
            client.ask()
        worker.step()
    assert all(sizes.count(1) == 3 and sum(sizes) - 3 <= 50 for sizes in engine.sizes())
    assert [len(client.tokens) for client in decoding] == [10, 10, 10]


def test_prompts_are_computed_in_round_robin() -> None:
    engine, worker = make(prefill_tokens=50)
    for number in range(3):
        Client(worker, str(number), [400 + number, *SYSTEM[:149]])
    run(worker)
    assert [[feed.slot for feed in feeds] for feeds in engine.passes] == [[1], [2], [3]] * 3


def test_a_system_prompt_that_eight_prompts_share_is_computed_once() -> None:
    engine, worker = make()
    prompts = [[*SYSTEM, 450 + number, number] for number in range(8)]
    clients = [Client(worker, str(number), prompt) for number, prompt in enumerate(prompts)]
    run(worker)
    num_run = sum(map(sum, engine.sizes()))
    # Each has two tokens of its own, and may read some again rather than copy so few.
    assert num_run <= len(SYSTEM) + 8 * (2 + 16)
    assert [client.tokens for client in clients] == [own(prompt, 1) for prompt in prompts]
    reused = [client.verdicts[0].num_cached for client in clients]
    assert num_run + sum(reused) == sum(map(len, prompts))
    assert engine.usage.num_cached == sum(reused)


def test_only_the_first_verdict_has_cached_tokens() -> None:
    _, worker = make()
    Client(worker, "first", SYSTEM)
    run(worker)
    client = Client(worker, "second", SYSTEM)
    run(worker)
    client.ask()
    run(worker)
    assert [verdict.num_cached for verdict in client.verdicts] == [len(SYSTEM) - 1, 0]
    assert client.tokens == own(SYSTEM, 2)


def test_decoded_tokens_do_not_count_as_prefill() -> None:
    engine, worker = make(prefill_tokens=8)
    client = Client(worker, "a", list(range(20)))
    worker.receive("a", Forward(0, 20, (499, 499)))
    run(worker)
    client.ask()
    run(worker)
    assert [[feed.is_prompt for feed in feeds] for feeds in engine.passes] == [
        [True],
        [True],
        [True],
        [False],
    ]


# Memory


def test_a_session_that_waits_for_memory_gets_the_same_answer_later() -> None:
    engine, worker = make(memory=50)
    first, second = Client(worker, "first", [1, 2]), Client(worker, "second", [3, 4], room=40)
    wanted = own([3, 4], 4)
    worker.receive("second", Forward(0, 2, tuple(wanted[:3])))  # its draft is open already
    run(worker)
    assert (worker.num_sessions, worker.num_waiting) == (1, 1)
    assert first.tokens
    assert not second.verdicts
    worker.close("first")
    run(worker)
    assert (worker.num_sessions, worker.num_waiting) == (1, 0)
    [verdict] = second.verdicts
    assert (verdict.num_checked, verdict.num_accepted, verdict.next_token) == (3, 3, wanted[3])
    worker.close("second")
    assert engine.usage.num_reserved == 0


def test_a_waiting_session_that_fails_leaves_the_waiting_queue() -> None:
    _, worker = make(memory=30)
    Client(worker, "first", [1, 2])
    second, third = Client(worker, "second", [3, 4]), Client(worker, "third", [5, 6])
    worker.receive("second", Forward(0, 9, (1,)))
    assert ["gap" in str(error) for error in second.errors] == [True]
    worker.close("second")
    worker.close("first")
    run(worker)
    assert third.tokens == own([5, 6], 1)


def test_only_a_session_that_waited_too_long_is_refused_with_advice() -> None:
    _, worker = make(memory=30)
    first, second = Client(worker, "first", [1, 2]), Client(worker, "second", [3, 4])
    worker.give_up("first")
    worker.give_up("second")
    assert first.errors == []
    [error] = second.errors
    assert isinstance(error, CacheFullError)
    assert "--cache-mib" in str(error)
    worker.close("second")
    assert (worker.num_sessions, worker.num_waiting) == (1, 0)


def test_a_full_waiting_queue_refuses_at_once() -> None:
    _, worker = make(memory=30)
    for name in "abc":
        Client(worker, name, [1, 2])
    with pytest.raises(CacheFullError, match="2 sessions wait"):
        Client(worker, "d", [1, 2])
