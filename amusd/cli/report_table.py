"""Tables of reports, which fit the terminal without cut cells.

Columns that do not fit are left out, the least important ones first, and a line names them. If the
most important ones do not fit either, each row becomes a block of lines.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

_ALWAYS = 0
_UNBOUNDED = 10_000


@dataclass(frozen=True, slots=True)
class Column:
    """A column. Those with the highest ``rank`` are left out first; 0: never."""

    heading: str
    is_text: bool = False
    rank: int = _ALWAYS


class ReportTable:
    """A table of one kind of report."""

    def __init__(self, *columns: Column, title: str = "") -> None:
        """Start without rows."""
        self._title = title
        self._columns = columns
        self._rows: list[tuple[str, ...]] = []

    def add(self, *cells: str) -> None:
        """Add a row, with a cell for each column."""
        if len(cells) != len(self._columns):
            raise ValueError(f"{len(cells)} cells for {len(self._columns)} columns")
        self._rows.append(cells)

    def print(self, console: Console | None = None) -> None:
        """Print the table as wide as it fits."""
        console = console or Console(markup=False, highlight=False)
        shown = list(range(len(self._columns)))
        while self._width(shown, console) > console.width:
            droppable = [index for index in shown if self._columns[index].rank]
            if not droppable:
                self._print_blocks(console)
                return
            shown.remove(max(droppable, key=lambda index: (self._columns[index].rank, index)))
        console.print(self._table(shown))
        left_out = [one.heading for index, one in enumerate(self._columns) if index not in shown]
        if left_out:
            console.print(f"left out, for the width of {console.width}: {', '.join(left_out)}")

    def _table(self, shown: Sequence[int]) -> Table:
        table = Table(
            title=self._title or None, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
        )
        for index in shown:
            column = self._columns[index]
            justify = "left" if column.is_text else "right"
            table.add_column(column.heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for row in self._rows:
            table.add_row(*(row[index] for index in shown))
        return table

    def _width(self, shown: Sequence[int], console: Console) -> int:
        table = self._table(shown)
        table.title = None  # it wraps
        options = console.options.update(width=_UNBOUNDED)
        lines = console.render_lines(table, options, pad=False)
        return max(sum(part.cell_length for part in line) for line in lines)

    def _print_blocks(self, console: Console) -> None:
        """Print one line for each cell."""
        if self._title:
            console.print(self._title)
        widest = max(len(column.heading) for column in self._columns)
        for row in self._rows:
            console.print()
            for column, cell in zip(self._columns, row, strict=True):
                console.print(f"{column.heading:<{widest}}  {cell}", soft_wrap=True)
