"""Load: arrival times, percentiles, throughput and what is said of them."""

from statistics import mean

import pytest

from amusd.cli.load import Load, LoadMeasurement, RequestTimes, percentiles
from amusd.cli.load_tables import show, verdict
from amusd.cli.measure import reference_of
from tests.cli.test_measure import statistics


def measurement(name: str, seconds: float, *requests: RequestTimes) -> LoadMeasurement:
    return LoadMeasurement(name, list(requests), seconds)


def request(*tokens: int) -> RequestTimes:
    counts = statistics(num_output_tokens=len(tokens), num_passes=2)
    return RequestTimes((0.1, 0.2, 0.4), tokens, counts)


def test_requests_arrive_at_the_rate_and_at_the_same_times_for_all() -> None:
    load = Load(concurrency=4, request_rate=5.0)
    arrivals = load.arrivals(4000)
    assert arrivals == sorted(arrivals) == load.arrivals(4000)
    assert mean(arrivals[i + 1] - arrivals[i] for i in range(3999)) == pytest.approx(0.2, rel=0.05)


def test_without_a_rate_all_requests_are_there_at_once() -> None:
    assert Load(concurrency=4).arrivals(3) == [0.0, 0.0, 0.0]
    assert Load().is_one_by_one
    assert not Load(concurrency=2).is_one_by_one
    assert not Load(request_rate=1.0).is_one_by_one


def test_percentiles_are_in_milliseconds() -> None:
    found = percentiles([number / 1000 for number in range(101)])
    assert found == pytest.approx({"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0})
    assert percentiles([0.25])["p99"] == 250.0
    assert percentiles([]) == {}


def test_throughput_counts_the_tokens_of_all_requests() -> None:
    plain = measurement("autoregressive", 2.0, request(1, 2, 3), request(4, 5, 6))
    fast = measurement("amusd", 1.0, request(1, 2, 3), request(4, 5, 6))
    figures = fast.report(reference_of([fast, plain]))
    assert plain.tokens_per_second == 3.0
    assert figures["speedup"] == 2.0
    assert figures["outputs_identical"]
    assert figures["inter_chunk_ms"]["p50"] == pytest.approx(150.0)
    assert figures["time_to_first_token_ms"]["p50"] == pytest.approx(100.0)
    assert verdict([plain, fast]) == "amusd gives 2.00x the tokens a second of autoregressive."
    assert verdict([plain]) == "autoregressive gives 3 tokens a second."


def test_other_tokens_are_seen_and_failures_are_no_difference(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = measurement("autoregressive", 1.0, request(1), request(2))
    failed = measurement("amusd", 1.0, request(1), RequestTimes((), failure="it is busy"))
    other = measurement("speculative", 1.0, request(1), request(3))
    assert failed.same_outputs(plain)
    assert not other.same_outputs(plain)
    assert failed.report(plain)["failures"] == ["it is busy"]
    show([plain, failed], "two requests")
    text = capsys.readouterr().out
    assert "amusd: it is busy" in text
    assert "Nothing gives more tokens a second than autoregressive." in text
