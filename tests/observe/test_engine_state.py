"""The exported state of an engine that does not answer."""

from concurrent.futures import Future

import pytest
from prometheus_client import CollectorRegistry

from amusd.fleet.model_description import CacheUsage
from amusd.observe import engine_state as engine
from amusd.observe.engine_state import EngineCollector, EngineState
from amusd.protocol.errors import UnavailableError


def shown(collector: EngineCollector) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(collector)
    return {sample.name: sample.value for family in registry.collect() for sample in family.samples}


def test_a_loading_model_has_no_sessions() -> None:
    def read() -> "Future[EngineState]":
        raise UnavailableError("the service is loading its model")

    assert set(shown(EngineCollector(read)).values()) == {0.0}


def test_during_a_long_pass_the_last_known_state_is_exported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "_READ_SECONDS", 0.01)
    answers: list[Future[EngineState]] = [Future(), Future()]
    usage = CacheUsage(max_tokens=100, num_reserved=30, num_computed=5, num_cached=7)
    answers[0].set_result(EngineState(5, 1, usage, num_left_out=3))
    collector = EngineCollector(lambda: answers.pop(0))
    first = shown(collector)
    assert first["amusd_requests_running"] == 2
    assert first["amusd_requests_waiting"] == 4
    assert first["amusd_kv_tokens_reserved"] == 30
    assert first["amusd_prefix_cache_query_tokens_total"] == 12
    assert shown(collector) == first
