"""The native library is used only if it is built, fits these sources, and the processor has it."""

import ctypes
import logging
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from amusd.engine.loading.model_source import LoadedModel
from amusd.engine.model_engine import serve
from amusd.engine.native import library as library_module
from amusd.engine.native.library import STRUCTURES, library, unavailable_reason
from amusd.fleet.model_description import ModelDescription
from amusd.fleet.vocabulary import Vocabulary
from tests import tiny

needs_native = pytest.mark.skipif(
    unavailable_reason() is not None, reason=f"no native engine: {unavailable_reason()}"
)
OTHER_LIBRARY = "numpy._core._multiarray_umath"  # any shared library that has none of the functions


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    library.cache_clear()
    yield
    library.cache_clear()


@needs_native
def test_both_sides_agree_on_all_structures() -> None:
    sizes = (ctypes.c_size_t * len(STRUCTURES))()
    assert library().amusd_structure_sizes(sizes, len(STRUCTURES)) == len(STRUCTURES)
    assert list(sizes) == [ctypes.sizeof(structure) for structure in STRUCTURES]


@needs_native
@pytest.mark.parametrize("index", range(len(STRUCTURES)))
def test_a_structure_of_another_size_is_refused(
    index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = [("one_more", ctypes.c_int64)]
    larger = type(STRUCTURES[index].__name__, (STRUCTURES[index],), {"_fields_": fields})
    changed = [*STRUCTURES[:index], larger, *STRUCTURES[index + 1 :]]
    monkeypatch.setattr(library_module, "STRUCTURES", tuple(changed))
    size = ctypes.sizeof(STRUCTURES[index])
    assert unavailable_reason() == (
        f"its library is built from other sources, build it again: its {larger.__name__} has "
        f"{size} bytes instead of {size + 8}"
    )


@needs_native
@pytest.mark.parametrize("change", [STRUCTURES[:-1], (*STRUCTURES, STRUCTURES[0])])
def test_another_number_of_structures_is_refused(
    change: tuple[type[ctypes.Structure], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_module, "STRUCTURES", change)
    known, here = len(STRUCTURES), len(change)
    assert f"it has {known} structures, not {here}" in str(unavailable_reason())


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("amusd.engine.native.no_such_module", "not built at installation"),
        ("json", "cannot be opened"),  # a Python file is no shared library
        (OTHER_LIBRARY, "built from other sources.*amusd_native_supported"),
    ],
)
def test_a_library_that_is_missing_broken_or_old_is_a_refusal_and_no_crash(
    module: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(library_module, "_MODULE", module)
    description = ModelDescription("tiny", "cpu", "float32", 0, 400, tiny.VOCABULARY, Vocabulary(0))
    found = serve(LoadedModel(tiny.build("llama"), description)).description
    assert found.runner == "ragged"
    assert found.runner_reason.startswith("native runner refused: it")
    assert re.search(reason, found.runner_reason)
    assert found.runner_reason in caplog.text


def test_a_library_without_the_newest_function_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    old: Any = SimpleNamespace(amusd_native_supported=lambda: 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: old)
    monkeypatch.setattr(library_module, "_MODULE", OTHER_LIBRARY)
    assert "amusd_structure_sizes" in str(unavailable_reason())


def test_a_processor_without_avx512_is_named_as_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(amusd_native_supported=lambda: 0))
    monkeypatch.setattr(library_module, "_MODULE", OTHER_LIBRARY)
    assert unavailable_reason() == "the processor lacks AVX-512"
