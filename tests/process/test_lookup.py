"""N-gram lookup beside a model, through real services, on a text that repeats itself."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from amusd.analysis.generation_statistics import Statistics
from amusd.client import Client, Options
from amusd.prompts import Prompt
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.strategy import Strategy
from amusd.v1 import draft_pb2, draft_pb2_grpc, model_pb2
from tests.process.services import (
    DRAFT_MODEL,
    VERIFY_MODEL,
    Service,
    Starter,
    Trio,
    amusd,
    start_trio,
)
from tests.process.synthetic_models import expected_output
from tests.process.test_draft_stream import Stream

pytestmark = pytest.mark.process

PERIOD = 24
VERIFY = f"{VERIFY_MODEL},period={PERIOD}"
DRAFT = f"{DRAFT_MODEL},period={PERIOD}"


@pytest.fixture(scope="module")
def repeating(start_for_all: Starter) -> Trio:
    return start_trio(start_for_all, VERIFY, DRAFT, draft_flags=("--lookup",))


@pytest.fixture(scope="module")
def lookup_alone(start_for_all: Starter) -> Service:
    service = start_for_all("draft", "--model", "prompt-lookup")
    service.wait_until_serving()
    return service


@pytest.fixture
def client(repeating: Trio) -> Iterator[Client]:
    with Client(repeating.orchestrator.address, timeout_seconds=60) as connected:
        yield connected


def sources_of(service: Service) -> list[int]:
    with service.channel() as channel:
        stub = draft_pb2_grpc.DraftServiceStub(channel)
        return list(stub.GetDraftInfo(draft_pb2.GetDraftInfoRequest(), timeout=10).sources)


def check_sums(found: Statistics) -> None:
    sources = found.acceptance_per_source
    assert sum(one.num_drafted for one in sources) == found.num_drafted
    assert sum(one.num_checked for one in sources) == found.num_accepted + found.num_rejected
    assert sum(one.num_accepted for one in sources) == found.num_accepted


def test_lookup_drafts_a_text_that_repeats_itself_and_changes_no_token(client: Client) -> None:
    prompt = (3, 1, 4, 1, 5)
    plain = client.generate(Prompt(tokens=prompt), Options(Strategy.AUTOREGRESSIVE, 120)).wait()
    assert plain.tokens == expected_output(VERIFY, prompt, 120)
    assert plain.summary().acceptance_per_source == ()
    for strategy in (Strategy.SPECULATIVE, Strategy.AMUSD):
        generation = client.generate(Prompt(tokens=prompt), Options(strategy, 120)).wait()
        assert generation.tokens == plain.tokens
        found = generation.summary()
        assert not found.fallback_reason
        check_sums(found)
        model, looked_up = found.acceptance_per_source
        assert (model.source, looked_up.source) == (DraftSource.MODEL, DraftSource.LOOKUP)
        assert model.num_checked > model.num_accepted > 0
        # After the first period every lookup is right.
        assert looked_up.num_accepted == looked_up.num_checked >= 120 - 3 * PERIOD
        assert found.tokens_per_pass > 1.5


def test_a_draft_service_reports_its_sources(
    repeating: Trio, lookup_alone: Service, trio: Trio
) -> None:
    both = repeating.draft
    assert sources_of(both) == [model_pb2.DRAFT_SOURCE_MODEL, model_pb2.DRAFT_SOURCE_LOOKUP]
    assert sources_of(lookup_alone) == [model_pb2.DRAFT_SOURCE_LOOKUP]
    assert sources_of(trio.draft) == [model_pb2.DRAFT_SOURCE_MODEL]
    assert "drafting by lookup and model" in both.log.read_text()


def test_proposals_of_a_lookup_take_no_step_and_no_time_of_the_device(
    lookup_alone: Service,
) -> None:
    with lookup_alone.channel() as channel:
        stream = Stream(channel).open(
            token_ids=[7, 8, 9, 10, 11, 7, 8], record_times=True, tokens_per_proposal=4
        )
        [proposal] = stream.proposals(4)
        stream.end()
    assert list(proposal.token_ids) == [9, 10, 11, 7]
    assert proposal.source == model_pb2.DRAFT_SOURCE_LOOKUP
    assert (proposal.num_steps, len(proposal.steps)) == (0, 0)
    assert proposal.draft_seconds == proposal.device_seconds == 0.0


def test_generate_shows_the_acceptance_of_each_source() -> None:
    pair = ("--draft", DRAFT, "--verify", VERIFY, "--lookup")
    done = amusd("generate", "hello", "--raw", "--max-tokens", "90", *pair)
    assert done.returncode == 0, done.stderr
    assert "% (model " in done.stderr
    assert ", lookup 100%)" in done.stderr


def test_bench_shows_the_acceptance_of_each_source(repeating: Trio, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "bench.json"
    prompts.write_text('{"prompt": "one"}\n')
    done = amusd(
        "bench", "--prompts", str(prompts), "--max-tokens", "90", "--strategies",
        "autoregressive,amusd", "--output", str(output),
        "--address", repeating.orchestrator.address,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "accept by source" in done.stdout
    plain, overlapped = json.loads(output.read_text())["runs"]
    assert plain["acceptance_per_source"] == {}
    looked_up = overlapped["acceptance_per_source"]["lookup"]
    assert looked_up["drafted"] >= looked_up["checked"] == looked_up["accepted"] > 0
