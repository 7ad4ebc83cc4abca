"""What strategies ask of the draft."""

from amusd.protocol.strategy import DraftPlan, Strategy, draft_plan


def test_autoregressive_asks_nothing_of_the_draft() -> None:
    assert draft_plan(Strategy.AUTOREGRESSIVE, 5) is None


def test_speculative_wants_all_of_its_lookahead_in_one_proposal() -> None:
    assert draft_plan(Strategy.SPECULATIVE, 5) == DraftPlan(5, tokens_per_proposal=5)


def test_amusd_wants_each_token_as_soon_as_it_is_written() -> None:
    assert draft_plan(Strategy.AMUSD, 5) == DraftPlan(5, tokens_per_proposal=1)
