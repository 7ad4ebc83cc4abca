"""The metrics of real processes add up to the statistics of their clients."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version

import psutil
import pytest

from amusd.cli.local_services import LocalSettings, local_services
from amusd.client import Client, Generation, Options
from amusd.observe.metric_list import METRIC_NAMES, Role, names_of
from amusd.prompts import Prompt
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.strategy import Strategy
from tests.process.rollbacks import Rollbacks
from tests.process.scrape import Scrape, WatchedTrio, free_port, scrape, start_watched
from tests.process.services import DRAFT_MODEL, VERIFY_MODEL, Starter, amusd, becomes_true
from tests.process.test_draft_stream import Stream

pytestmark = pytest.mark.process

OF_A_GPU = "amusd_device_"
ROLES: tuple[Role, ...] = ("orchestrator", "draft", "verify")


@pytest.fixture(scope="module")
def watched(start_for_all: Starter) -> WatchedTrio:
    models = f"{VERIFY_MODEL},batch=8,memory=400", f"{DRAFT_MODEL},batch=8"
    return start_watched(start_for_all, *models)


@pytest.fixture
def trio(watched: WatchedTrio) -> WatchedTrio:
    assert becomes_true(lambda: is_at_rest(watched))
    return replace(watched, before={role: watched.scrape(role) for role in ROLES})


def generate(trio: WatchedTrio, strategy: Strategy, num_sessions: int) -> list[Generation]:
    def one(number: int) -> Generation:
        with Client(trio.orchestrator.address, timeout_seconds=60) as client:
            prompt = Prompt(tokens=(number, 7, 9))
            return client.generate(prompt, Options(strategy, 30)).wait()

    with ThreadPoolExecutor(num_sessions) as pool:
        return list(pool.map(one, range(num_sessions)))


def is_at_rest(trio: WatchedTrio) -> bool:
    """Whether no service has a session or memory in use."""
    gauges = (
        "amusd_sessions_open",
        "amusd_requests_running",
        "amusd_requests_waiting",
        "amusd_kv_tokens_reserved",
    )
    scrapes = [trio.scrape(role) for role in ROLES]
    return all(one[name] == 0 for one in scrapes for name in gauges)


def test_metrics_add_up_to_the_statistics_of_the_clients(trio: WatchedTrio) -> None:
    generations = [
        generation for strategy in Strategy for generation in generate(trio, strategy, 4)
    ]
    assert becomes_true(lambda: is_at_rest(trio))
    summaries = [generation.summary() for generation in generations]
    tokens = sum(len(generation.tokens) for generation in generations)
    drafted = sum(summary.num_drafted for summary in summaries)
    accepted = sum(summary.num_accepted for summary in summaries)
    wasted = sum(summary.num_wasted for summary in summaries)
    rejected = sum(summary.num_rejected for summary in summaries)
    seen = trio.counted("orchestrator")
    assert seen["amusd_generation_tokens_total"] == tokens == 3 * 4 * 30
    assert seen["amusd_prompt_tokens_total"] == sum(one.num_prompt_tokens for one in summaries)
    assert seen["amusd_spec_decode_num_draft_tokens_total"] == drafted
    assert seen["amusd_spec_decode_num_accepted_tokens_total"] == accepted
    assert seen["amusd_spec_decode_num_rejected_tokens_total"] == rejected
    assert seen["amusd_spec_decode_num_wasted_tokens_total"] == wasted
    assert drafted == accepted + rejected + wasted
    assert seen["amusd_rollbacks_total"] == sum(one.num_rollbacks for one in summaries) > 0
    assert seen["amusd_spec_decode_num_accepted_tokens_per_pos_total"] == sum(
        place.num_accepted for one in summaries for place in one.acceptance_per_position
    )
    for name in ("amusd_time_to_first_token_seconds_count", "amusd_request_seconds_count"):
        assert seen[name] == len(generations)
    assert seen["amusd_request_seconds_sum"] >= sum(one.wall_seconds for one in summaries)
    assert seen["amusd_request_failures_total"] == 0
    num_passes = sum(one.num_passes for one in summaries)
    assert seen["amusd_passes_total"] == num_passes
    assert 0 < seen["amusd_spec_decode_num_drafts_total"] < num_passes
    assert seen.labelled["amusd_request_success_total", "length"] == len(summaries) / 3
    assert seen["amusd_request_success_total"] == len(summaries)
    assert seen["amusd_request_generation_tokens_sum"] == tokens
    assert seen["amusd_request_prompt_tokens_sum"] == seen["amusd_prompt_tokens_total"]
    assert seen["amusd_time_per_output_token_seconds_count"] == len(summaries)
    num_gaps = seen["amusd_inter_token_latency_seconds_count"]
    assert len(summaries) < num_gaps <= num_passes - len(summaries)
    assert seen["amusd_build_info"] == 0  # it has not changed since the start
    assert trio.scrape("draft").labelled["amusd_build_info", version("amusd")] == 1


def test_engines_count_their_passes_and_memory(trio: WatchedTrio) -> None:
    summaries = [one.summary() for one in generate(trio, Strategy.AMUSD, 4)]
    assert becomes_true(lambda: is_at_rest(trio))
    verify, draft = trio.counted("verify"), trio.counted("draft")
    assert 0 < verify["amusd_verify_pass_seconds_count"] == verify["amusd_pass_sessions_count"]
    assert verify["amusd_pass_sessions_sum"] >= sum(one.num_passes for one in summaries)
    assert verify["amusd_verify_pass_seconds_sum"] > 0.9 * sum(
        one.verify_busy_seconds for one in summaries
    )
    assert trio.scrape("verify")["amusd_kv_tokens_max"] == 400
    assert verify["amusd_prefix_cache_query_tokens_total"] == sum(
        one.num_prompt_tokens for one in summaries
    )
    assert draft["amusd_generation_tokens_total"] >= sum(one.num_drafted for one in summaries)
    assert draft["amusd_draft_step_seconds_count"] > 0
    # A session may end before its last rollback arrives.
    assert 0 < draft["amusd_rollbacks_total"] <= sum(one.num_rollbacks for one in summaries)
    for one in (verify, draft):
        assert one["amusd_request_seconds_count"] == len(summaries)
        assert one["amusd_request_failures_total"] == 0


def test_a_draft_service_counts_the_rollbacks_that_it_has_done(trio: WatchedTrio) -> None:
    with trio.draft.channel() as channel:
        stream = Stream(channel).open()
        stream.proposals(4)
        rollbacks = Rollbacks(stream.stub)
        refused = [
            rollbacks.roll_back(epoch, 3 + epoch, 1).HasField("error") for epoch in (1, 2, 2, 3)
        ]
        assert refused == [False, False, True, False]
        assert becomes_true(lambda: trio.counted("draft")["amusd_rollbacks_total"] == 3)
        rollbacks.end()
        stream.end()
    assert becomes_true(lambda: is_at_rest(trio))
    assert trio.counted("draft")["amusd_rollbacks_total"] == 3


def test_a_session_is_seen_while_it_runs(trio: WatchedTrio) -> None:
    with Client(trio.orchestrator.address, timeout_seconds=60) as client:
        pieces = iter(client.generate(Prompt(tokens=(1, 2)), Options(max_tokens=380)))
        next(pieces)
        for role in ROLES:
            seen = trio.scrape(role)
            assert seen["amusd_sessions_open"] == seen["amusd_requests_running"] == 1
        assert trio.scrape("verify")["amusd_kv_tokens_reserved"] == 382
    # The client is gone before the end of its output.
    assert becomes_true(lambda: is_at_rest(trio))
    seen = trio.counted("orchestrator")
    assert seen.labelled == {**seen.labelled, ("amusd_request_failures_total", "CANCELLED"): 1.0}
    assert seen["amusd_spec_decode_num_draft_tokens_total"] > 0


def test_failures_are_counted_by_status(trio: WatchedTrio) -> None:
    with Client(trio.orchestrator.address, timeout_seconds=60) as client:
        for _ in range(2):
            with pytest.raises(InvalidInputError):
                client.generate(Prompt(tokens=(999_999,))).wait()
        # Without a draft, nothing is written to the refused stream. gRPC replaces the status of a
        # stream by that of a failed write, and the request would be tried once more.
        options = Options(Strategy.AUTOREGRESSIVE, max_tokens=500)
        with pytest.raises(InvalidInputError, match="--cache-mib"):
            client.generate(Prompt(tokens=(1,)), options).wait()
    assert becomes_true(lambda: is_at_rest(trio))
    failures = failures_of(trio.counted("orchestrator"))
    assert failures == {"INVALID_ARGUMENT": 3}
    assert failures_of(trio.counted("verify")) == {"INVALID_ARGUMENT": 1}


def failures_of(seen: Scrape) -> dict[str, float]:
    return {
        status: number
        for (name, status), number in seen.labelled.items()
        if name == "amusd_request_failures_total"
    }


def test_services_export_exactly_the_listed_metrics(trio: WatchedTrio) -> None:
    exported: set[str] = set()
    for role in ROLES:
        names = trio.scrape(role).names
        assert names == {one for one in names_of(role) if not one.startswith(OF_A_GPU)}
        exported |= names
    assert exported == {name for name in METRIC_NAMES if not name.startswith(OF_A_GPU)}


def test_a_port_for_metrics_that_is_taken_ends_the_service_with_advice(start: Starter) -> None:
    port = str(free_port())
    start("verify", "--model", VERIFY_MODEL, "--metrics-port", port).wait_until_serving()
    result = amusd("serve", "draft", "--model", DRAFT_MODEL, "--port", "0", "--metrics-port", port)
    assert result.returncode == 1
    assert "--metrics-port" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_metrics_are_off_by_default(start: Starter) -> None:
    service = start("verify", "--model", VERIFY_MODEL)
    service.wait_until_serving()
    listening = [
        connection.laddr.port
        for connection in psutil.Process(service.process.pid).net_connections()
        if connection.status == "LISTEN"
    ]
    assert listening == [int(service.address.rpartition(":")[2])]


def test_local_services_have_metrics_ports_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = (free_port(), free_port(), free_port())
    monkeypatch.setenv("AMUSD_METRICS_PORT", str(free_port()))  # three services cannot share a port
    settings = LocalSettings(draft=DRAFT_MODEL, verify=VERIFY_MODEL, metrics_ports=ports)
    with local_services(settings):
        for role, port in zip(ROLES, ports, strict=True):
            assert scrape(port).names <= names_of(role)
    with local_services(LocalSettings(draft=DRAFT_MODEL, verify=VERIFY_MODEL)):
        pass  # the port in the environment is for none of them
