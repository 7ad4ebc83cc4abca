"""Branches through the real services: the same tokens, and passes that need not wait."""

import pytest

from amusd.client import Client, Options
from amusd.prompts import Prompt
from amusd.protocol.events import Forward, Proposal, Rollback
from amusd.protocol.strategy import Strategy
from tests.process.scrape import start_watched
from tests.process.services import Starter, becomes_true, start_trio
from tests.process.synthetic_models import expected_output

pytestmark = pytest.mark.process

# Long steps: where a busy machine makes rows look dear, there are no branches.
VERIFY = "synthetic:vocabulary=512,pass_ms=120"
DRAFT = "synthetic:vocabulary=512,pass_ms=12,agreement=0.5,batch=7,alternatives=3"


def test_a_rejection_that_a_branch_was_held_for_costs_no_wait(start: Starter) -> None:
    trio = start_watched(start, VERIFY, DRAFT)
    num_hits = num_rollbacks = num_branches = 0
    with Client(trio.orchestrator.address, timeout_seconds=60) as client:
        for first in range(2):
            options = Options(Strategy.AMUSD, 32, timeline=True)
            generation = client.generate(Prompt(tokens=(first, 1)), options).wait()
            assert generation.tokens == expected_output(VERIFY, (first, 1), 32)
            found = generation.summary()
            assert not found.fallback_reason
            assert found.num_rejected == found.num_rollbacks
            assert found.num_drafted == found.num_accepted + found.num_rejected + found.num_wasted
            assert generation.timeline is not None
            messages = [event.message for event in generation.timeline.events]
            sent = [one for one in messages if isinstance(one, Proposal)]
            # A branch comes again as it grows, and may come after its outcome is known.
            roots = {(one.epoch, branch.root) for one in sent for branch in one.branches}
            assert 0 < found.num_branches <= len(roots)
            assert any(one.branches for one in messages if isinstance(one, Forward))
            taken = [one for one in messages if isinstance(one, Rollback) and one.branch_tokens]
            assert len(taken) <= found.num_branch_hits
            num_hits += found.num_branch_hits
            num_rollbacks += found.num_rollbacks
            num_branches += found.num_branches
    # Three next-best tokens hold four of five right ones; a branch can also come too late.
    assert 0 < num_hits <= num_rollbacks
    assert becomes_true(lambda: trio.scrape("verify")["amusd_branches_held"] == 0)
    # A session may end before the verify service or the draft has had its last message.
    assert 0 < trio.scrape("verify")["amusd_branch_starts_total"] <= num_rollbacks
    drafted = trio.scrape("draft")
    assert drafted["amusd_branch_tokens_total"] > drafted["amusd_branches_prepared_total"]
    assert drafted["amusd_branches_prepared_total"] >= num_branches
    assert 0 < drafted["amusd_branch_rollback_hits_total"] <= num_rollbacks
    assert drafted["amusd_branch_seconds_total"] > 0


def test_other_strategies_ask_for_no_branches(start: Starter) -> None:
    trio = start_trio(start, verify_model=VERIFY, draft_model=DRAFT)
    with Client(trio.orchestrator.address, timeout_seconds=60) as client:
        generation = client.generate(
            Prompt(tokens=(1, 2)), Options(Strategy.SPECULATIVE, 10)
        ).wait()
    assert generation.tokens == expected_output(VERIFY, (1, 2), 10)
    assert generation.summary().num_branches == 0
