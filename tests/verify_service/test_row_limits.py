"""Which proposals a verify worker checks when their rows cost time."""

from dataclasses import replace

import pytest

from amusd.policy.row_budget import RowBudget
from amusd.protocol.events import Forward
from tests.counting import CountingEngine
from tests.verify_service.test_shared_passes import LIMITS, MODEL, Client, run
from verify_service.pass_profile import profile_passes
from verify_service.verifying import Verifying, VerifyOpening, VerifyWorker


def served(
    row_ms: float,
    num_sessions: int,
    max_checked: int,
    probabilities: tuple[float, ...] = (),
) -> list[Client]:
    """Return sessions that have each proposed the verify model's next four tokens.

    The first session states ``probabilities``.
    """
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
        stated = probabilities if client is clients[0] else ()
        forward = Forward(0, position, tuple(known[position:]), max_checked, probabilities=stated)
        worker.receive(client.name, forward)
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


@pytest.mark.parametrize(
    ("probabilities", "num_checked"),
    [((0.9, 0.9, 0.9), 3), ((0.9, 0.05, 0.9), 1), ((0.05, 0.9, 0.9), 0), ((), 1)],
)
def test_proposals_are_checked_as_far_as_the_draft_believes_in_them(
    probabilities: tuple[float, ...], num_checked: int
) -> None:
    verifying = Verifying(CountingEngine(MODEL), LIMITS)
    for rows in range(1, 17):
        verifying.budget.observe(rows, 0.02 + rows * 0.01)
    sequence = verifying.open(VerifyOpening("a", [1, 2], max_position=20), lambda message: None)
    sequence.session.begin_pass(0)
    sequence.session.end_pass([3], 0.0)
    verifying.receive(sequence, Forward(0, 3, (4, 5, 6), 3, probabilities=probabilities))
    verifying.prepare([sequence])
    assert sequence.num_allotted == num_checked


def test_probabilities_that_do_not_fit_the_tokens_end_their_session_only() -> None:
    clients = served(0.0, num_sessions=2, max_checked=4, probabilities=(0.5,))
    [error] = clients[0].errors
    assert "1 probabilities beside 4 tokens" in str(error)
    assert clients[1].verdicts[1].num_accepted == 4


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
