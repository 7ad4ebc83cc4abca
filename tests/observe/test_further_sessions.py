"""Further sessions of a request: they count as sessions, and not as requests."""

import contextlib
import contextvars
from unittest.mock import MagicMock

from amusd.observe.metrics import Metrics
from amusd.observe.observer import Observer

OF_REQUEST = (
    "amusd_generation_tokens_total",
    "amusd_prompt_tokens_total",
    "amusd_request_seconds_count",
    "amusd_time_to_first_token_seconds_count",
)


def test_further_sessions_count_as_sessions_only() -> None:
    # The name of the session that is logged stays within the context.
    contextvars.copy_context().run(_check_further_sessions)


def _check_further_sessions() -> None:
    metrics = Metrics("orchestrator")
    observer = Observer("orchestrator", metrics)

    def value(name: str) -> float:
        labels = {"model_name": "", "strategy": "amusd"} if name in OF_REQUEST else {}
        return metrics.registry.get_sample_value(name, labels) or 0.0

    with observer.request(MagicMock()) as watch:
        watch.opened("first", 10, "amusd")
        with contextlib.suppress(ValueError), watch.another_session() as other:
            other.opened("second", 10, "amusd")
            assert value("amusd_sessions_open") == value("amusd_requests_waiting") == 2
            other.wrote(3)
            watch.wrote(2)
            assert value("amusd_requests_running") == 2
            raise ValueError
        assert value("amusd_sessions_open") == value("amusd_requests_running") == 1
    assert value("amusd_sessions_open") == value("amusd_requests_running") == 0
    assert value("amusd_requests_waiting") == 0
    assert value("amusd_generation_tokens_total") == 5
    assert value("amusd_prompt_tokens_total") == 10
    assert value("amusd_request_seconds_count") == 1
    assert value("amusd_time_to_first_token_seconds_count") == 1
    failures = metrics.registry.get_sample_value
    assert failures("amusd_request_failures_total", {"status": "INTERNAL"}) is None
