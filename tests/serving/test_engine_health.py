"""What an engine's health learns from its passes."""

import pytest

from amusd.serving.engine_health import EngineHealth, HealthSettings


def health(*passes: float, factor: float = 20.0) -> EngineHealth:
    """Return the health of an engine after passes of so many seconds."""
    found = EngineHealth(HealthSettings(hang_floor_seconds=1.0, hang_factor=factor))
    for seconds in passes:
        found.pass_ended(seconds)
    return found


def test_a_pass_may_take_many_times_the_slowest_recent_one() -> None:
    assert health().max_pass_seconds == 1.0
    assert health(0.01, 0.9).max_pass_seconds == pytest.approx(18.0)
    assert health(30.0).max_pass_seconds == pytest.approx(600.0)  # the first one: it is usual


def test_after_a_hang_a_pass_may_take_twice_its_time() -> None:
    assert health(0.01, 60.0).max_pass_seconds == pytest.approx(120.0)
    assert health(0.01, 60.0, 100.0).max_pass_seconds == pytest.approx(2000.0)
    assert health(0.01, 60.0, factor=1.0).max_pass_seconds == pytest.approx(60.0)
