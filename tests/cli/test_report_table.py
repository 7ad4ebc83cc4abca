"""Tables fit the terminal: columns are left out whole, and no cell is cut."""

import io

import pytest
from rich.console import Console

from amusd.cli.report_table import Column, ReportTable


def printed(width: int, table: ReportTable) -> str:
    text = io.StringIO()
    table.print(Console(file=text, width=width, markup=False, highlight=False))
    return text.getvalue()


def table() -> ReportTable:
    found = ReportTable(
        Column("strategy", is_text=True),
        Column("tokens per pass", rank=1),
        Column("rollbacks", rank=2),
        Column("ms"),
        title="three runs",
    )
    found.add("autoregressive", "1.00", "0", "5.5")
    found.add("transformers-assisted", "2.25", "17", "12.0")
    return found


def test_a_wide_terminal_shows_all_columns() -> None:
    text = printed(80, table())
    for word in ("three runs", "strategy", "tokens per pass", "rollbacks", "ms", "17", "12.0"):
        assert word in text
    assert "left out" not in text


def test_the_least_important_columns_are_left_out_first() -> None:
    assert "left out, for the width of 50: rollbacks" in printed(50, table())
    words = " ".join(printed(32, table()).split())
    assert "left out, for the width of 32: tokens per pass, rollbacks" in words


@pytest.mark.parametrize("width", range(12, 90))
def test_nothing_is_cut_at_any_width(width: int) -> None:
    text = printed(width, table())
    assert "…" not in text
    for word in ("transformers-assisted", "12.0", "5.5", "strategy"):
        assert word in text


def test_a_narrow_terminal_shows_blocks() -> None:
    lines = printed(20, table()).splitlines()
    assert "rollbacks        17" in lines
    assert "strategy         transformers-assisted" in lines


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="1 cells for 4 columns"):
        table().add("one")
