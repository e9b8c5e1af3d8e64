"""Tables for a terminal: columns of rows, and what happens where the terminal is too narrow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column as TableColumn
from rich.table import Table
from rich.text import Text

Shown = TypeVar("Shown")  # type of a table's rows


@dataclass(frozen=True)
class Column(Generic[Shown]):
    """A column of a table.

    Attributes:
        title: title of the column.
        show: a function of a row; or the name of a value: empty if a row lacks it, "-" if it is None.
        is_number: True to align the column to the right.
        form: format of a named value: a format specification or a function.
    """

    title: str
    show: str | Callable[[Shown], str | Text]
    is_number: bool = True
    form: str | Callable[[Any], str] = ""

    def cell(self, row: Shown) -> str | Text:
        """Return the text of a row in this column."""
        if not isinstance(self.show, str):
            return self.show(row)
        value = getattr(row, self.show, "")
        if value is None or value == "":
            return "-" if value is None else ""
        if not isinstance(self.form, str):
            return self.form(value)
        is_decimal = isinstance(value, float) and self.form
        return format(value, f"z{self.form}" if is_decimal else self.form)  # no -0.0000


_PLACE = 2  # characters of the number of a row
_NARROWEST = 12  # columns of text are not folded into fewer characters


class FittedTable(Table):
    """A table that breaks no number: where the terminal is too narrow, the first column becomes a numbered list, and
    the others follow in several tables."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = [self._least_width(column) for column in self.columns]
        room = options.max_width - 1
        if sum(widths) + 3 * len(widths) <= room:
            for column in self.columns:
                column.width = None
            if Measurement.get(console, options.update(width=10**4), self).maximum > options.max_width:
                for column, width in zip(self.columns, widths, strict=True):
                    column.width = width if column.justify == "right" else None
            yield from super().__rich_console__(console, options)
            return
        names, *columns = self.columns
        yield Text(str(self.title or names.header), style="italic")
        for place, (cell, row) in enumerate(zip(names.cells, self.rows, strict=True), 1):
            yield Text.assemble(
                f"{place:3} ", cell if isinstance(cell, Text) else str(cell), style=row.style or ""
            )
        room -= 3 + _PLACE
        while columns:
            count, used = 0, 0
            while count < len(columns) and (not count or used + widths[1 + count] + 3 <= room):
                used += widths[1 + count] + 3
                count += 1
            yield self._part(columns[:count], widths[1 : 1 + count])
            columns, widths = columns[count:], [widths[0], *widths[1 + count :]]

    def _part(self, columns: list[TableColumn], widths: list[int]) -> Table:
        """Return a table of some columns, with the number of each row in front."""
        part = Table()
        part.add_column("", justify="right", width=_PLACE)
        for column, width in zip(columns, widths, strict=True):
            part.add_column(column.header, justify=column.justify, overflow="fold", width=width)
        for place, row in enumerate(self.rows, 1):
            cells = [column._cells[place - 1] for column in columns]
            part.add_row(str(place), *cells, style=row.style, end_section=row.end_section)
        return part

    @staticmethod
    def _least_width(column: TableColumn) -> int:
        """Return the characters that a column needs: whole numbers, whole words of the title, some of each text."""
        words = max((cell_len(word) for word in str(column.header).split()), default=0)
        widest = max((cell_len(str(cell)) for cell in column.cells), default=0)
        return max(words, widest if column.justify == "right" else min(widest, _NARROWEST))


def table(
    rows: Iterable[Shown],
    columns: Iterable[Column[Shown]],
    title: str = "",
    style: Callable[[Shown], str] = lambda row: "",
) -> Table:
    """Create a table of rows and columns, with numbers aligned to the right."""
    shown, columns = FittedTable(title=title or None, title_justify="left"), list(columns)
    for column in columns:
        shown.add_column(column.title, justify="right" if column.is_number else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(column.cell(row) for column in columns), style=style(row))
    return shown
