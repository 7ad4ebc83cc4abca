import pytest

from amusd.engine.runners import selection as choice


@pytest.fixture
def without_native_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run models as where the native engine was not built."""
    monkeypatch.setattr(choice, "native_passes", lambda loaded, options: None)
