from typing import NoReturn

import pytest

from amusd.engine.runners import selection
from amusd.engine.runners.runner import RunnerRefusedError


@pytest.fixture
def without_native_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Select runners as on a machine where the native engine is not built."""

    def refuse(*_: object) -> NoReturn:
        raise RunnerRefusedError("this test disables it")

    monkeypatch.setattr(selection, "load_native_runner", refuse)
