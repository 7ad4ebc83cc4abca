import pytest

from amusd.engine.runners import selection as choice


@pytest.fixture
def without_native_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run models as where the native engine was not built."""
    monkeypatch.setattr(choice, "native_runner", lambda loaded, options, sampler: None)
