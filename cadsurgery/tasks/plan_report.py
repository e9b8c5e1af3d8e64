"""What `cadsurgery plan` prints, as plain values that can be kept.

Nothing here imports torch, so that a plan which is known is printed at once, see `tasks/recorded.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.text import Text

from cadsurgery.tasks.tables import Column, table

_STYLES = {"adapt": "bold green", "keep": "green", "barrier": "bold red", "exit": "yellow", "enter": "cyan"}


class PlanRow(NamedTuple):
    """The texts of a node, in the order of the table's columns."""

    node: str
    operation: str
    action: str
    output_stride: str
    macs: str
    reason: str


@dataclass(frozen=True)
class PlanReport:
    """A plan, as JSON and as text.

    Attributes:
        plan: the plan as JSON.
        summary: the text above the table; of the plan of another method, all of its text.
        rows: a row for each node; empty for the plan of another method.
        reasons: why each operation of the region is exact, stated once per operation.
    """

    plan: str
    summary: str
    rows: tuple[PlanRow, ...] = ()
    reasons: str = ""

    def render(self, *, all_nodes: bool = False) -> RenderableType:
        """Show the plan as a table; without `all_nodes`, dense nodes before the region are omitted."""
        if not self.rows:
            return Text(self.summary)
        shown = [row for row in self.rows if row.action != "dense" or all_nodes]
        return Group(Text(self.summary), table(shown, _columns()), Text(self.reasons, style="dim"))


def _columns() -> Iterator[Column[PlanRow]]:
    yield Column("node", "node", False)
    yield Column("operation", "operation", False)
    yield Column("action", lambda row: Text(row.action, style=_STYLES.get(row.action, "dim")), False)
    yield Column("output stride", "output_stride", False)
    yield Column("MACs", "macs")
    yield Column("reason", "reason", False)
