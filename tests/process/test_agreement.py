"""Drafts of every agreement: the same tokens, and the statistics that follow from it."""

from collections.abc import Iterator

import pytest

from amusd.client import Client, Options
from amusd.prompts import Prompt
from amusd.protocol.strategy import Strategy
from tests.process.services import VERIFY_MODEL, VOCABULARY, Service, start_service, start_trio
from tests.process.synthetic_models import expected_output

pytestmark = pytest.mark.process

AGREEMENTS = (0.0, 0.5, 1.0)
PROMPTS = [(0,), (511, 0, 511), tuple(range(100)), tuple(b"def main():")]


@pytest.fixture(scope="module", params=AGREEMENTS)
def drafted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[float, Client]]:
    """A client of services whose draft has the agreement of the parameter."""
    folder = tmp_path_factory.mktemp("agreement")
    running: list[Service] = []

    def starter(role: str, *flags: str) -> Service:
        running.append(start_service(folder / f"{role}.log", role, *flags))
        return running[-1]

    draft = f"synthetic:agreement={request.param},vocabulary={VOCABULARY},context=600"
    try:
        trio = start_trio(starter, draft_model=draft)
        with Client(trio.orchestrator.address, timeout_seconds=60) as client:
            yield request.param, client
    finally:
        for service in reversed(running):
            service.end()


@pytest.mark.parametrize("strategy", [Strategy.SPECULATIVE, Strategy.AMUSD])
@pytest.mark.parametrize("lookahead", range(1, 9))
def test_no_agreement_and_no_lookahead_changes_a_token(
    drafted: tuple[float, Client], strategy: Strategy, lookahead: int
) -> None:
    agreement, client = drafted
    prompt = PROMPTS[lookahead % len(PROMPTS)]
    generation = client.generate(Prompt(tokens=prompt), Options(strategy, 40, lookahead)).wait()
    assert generation.tokens == expected_output(VERIFY_MODEL, prompt, 40)
    found = generation.summary()
    assert not found.fallback_reason
    assert found.num_drafted == found.num_accepted + found.num_rejected + found.num_wasted
    # A pass writes what it accepts and one token more; proposals beyond the end are not written.
    assert found.num_passes + found.num_accepted >= found.num_output_tokens
    assert sum(place.num_checked for place in found.acceptance_per_position) <= (
        found.num_accepted + found.num_rejected
    )
    if agreement == 0.0:
        assert found.num_accepted == 0
        assert found.num_passes == 40
    if agreement == 1.0:
        assert found.num_rejected == found.num_rollbacks == 0
        assert found.num_accepted > 0


@pytest.mark.parametrize("drafted", [1.0], indirect=True)
def test_a_perfect_draft_fills_the_speculative_passes(drafted: tuple[float, Client]) -> None:
    _, client = drafted
    options = Options(Strategy.SPECULATIVE, 41, 4)
    found = client.generate(Prompt(tokens=(3,)), options).wait().summary()
    # The prompt's pass writes 1 token and all others 5, but the first and the last of them may
    # have fewer: the draft began at the prompt, and nothing is proposed beyond the end.
    assert found.num_passes in (9, 10)
    assert all(place.num_accepted == place.num_checked for place in found.acceptance_per_position)
    assert len(found.acceptance_per_position) == 4
