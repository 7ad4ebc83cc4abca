"""Which proposals a verify worker checks when their rows cost time."""

from dataclasses import replace

import pytest

from amusd.policy.row_budget import RowBudget
from amusd.protocol.events import Forward
from tests.counting import CountingEngine
from tests.verify_service.test_shared_passes import LIMITS, MODEL, Client, run
from verify_service.pass_profile import profile_passes
from verify_service.verifying import VerifyWorker


def served(row_ms: float, num_sessions: int, max_checked: int) -> list[Client]:
    """Return sessions that have each proposed the verify model's next four tokens."""
    engine = CountingEngine(replace(MODEL, pass_ms=1.0, row_ms=row_ms))
    worker = VerifyWorker(engine, LIMITS, 256)
    worker.warm_up()
    clients = [Client(worker, f"s{number}", [number, number + 1]) for number in range(num_sessions)]
    run(worker)
    for client in clients:
        known = [*client.prompt, *client.tokens]
        for _ in range(4):
            known.append(MODEL.next_token(known))
        position = len(client.prompt) + 1
        worker.receive(client.name, Forward(0, position, tuple(known[position:]), max_checked))
    run(worker)
    return clients


def test_proposals_are_checked_if_rows_are_free() -> None:
    for client in served(row_ms=0.0, num_sessions=4, max_checked=4):
        assert client.verdicts[1].num_checked == 4


def test_proposals_that_do_not_pay_wait_and_are_compared_later() -> None:
    for client in served(row_ms=1.0, num_sessions=4, max_checked=4):
        assert client.verdicts[1].num_checked < 4
        last = client.verdicts[-1]
        # All four were right: accepted, or equal to the token that a pass wrote itself.
        assert last.position + last.num_accepted + 1 >= len(client.prompt) + 5
        assert {verdict.epoch for verdict in client.verdicts} == {0}
        assert not client.errors


def test_without_a_limit_of_its_own_a_session_has_all_proposals_checked() -> None:
    for client in served(row_ms=1.0, num_sessions=4, max_checked=0):
        assert client.verdicts[1].num_checked == 4


def test_the_profile_knows_pass_times_and_leaves_nothing_behind() -> None:
    engine = CountingEngine(replace(MODEL, pass_ms=1.0, row_ms=0.5))
    budget = RowBudget()
    profile_passes(engine, budget)
    assert engine.num_open == 0
    assert engine.usage.num_reserved == 0
    for rows in (1, 8, 32):
        assert budget.times.pass_seconds(rows) == pytest.approx(1e-3 * (0.5 + rows / 2), rel=0.5)
