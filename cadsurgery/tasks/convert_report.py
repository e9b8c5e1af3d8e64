"""The reports of `cadsurgery convert`, `plan` and `macs`: plans, MACs, times and checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from cadsurgery.methods.method_files import AnyPlan
from cadsurgery.methods.side import MethodConversion
from cadsurgery.network.macs import LayerMacs, MacReport
from cadsurgery.support.counting import describe_not_counted
from cadsurgery.support.rows import Row, macs_columns, number, plain, ratio, time_columns
from cadsurgery.support.tables import Column, table
from cadsurgery.surgery.plan import Decision, Plan
from cadsurgery.tasks.report import RunReport

_BUSY = 1.3  # where the median of a few rounds is so many times the best, something else takes the processor
_STYLES = {"adapt": "bold green", "keep": "green", "barrier": "bold red", "exit": "yellow", "enter": "cyan"}


@dataclass(frozen=True, kw_only=True)
class ConversionReport(RunReport):
    """The report of `cadsurgery convert`, for any method.

    Rows of sides have their `name` and the `macs` of a call. For an adaptive network, further fields are the `mask`,
    the `normalisation` that the mask assumes, the `active_fraction`, results of the plan, and the `checks` of laws
    (empty if not verified).

    For other methods they are `not_counted`, operations without a counting rule, and for exits `threshold` and `error`,
    the relative error of the last exit with everything computed; for gates `is_verified`; for a sampled input `error`,
    the relative error when sampled uniformly at the image's size.

    Attributes:
        image: shape of the batch.
        sides: the original network, and the converted variants.
        file: file that was written.
        made: the method's part of the report.
        notes: notes that a user can act on.
    """

    image: tuple[int, ...]
    sides: tuple[Row, ...]
    file: str
    made: MethodConversion
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for `--json`."""
        values = super().to_dict()
        del values["made"]
        return {**values, "plan": self.made.summary.plain, **plain(self.made.more)}

    def parts(self) -> Iterator[RenderableType]:
        """Yield the network, the plan, the sides, the results of verification, and notes that a user can act on."""
        made = self.made
        if made.first:
            yield Text(made.first, style="bold yellow")
        yield self.heading()
        yield made.summary
        title = made.title or f"image of {self.image[2]}x{self.image[3]}"
        columns: list[Column[Row]] = [Column("network", "name", False)]
        given = self.sides[0]
        columns += macs_columns("given", lambda row: given)
        columns += time_columns("given", lambda row: given, has_median=True)
        yield table(self.sides, columns, title)
        torch = f", torch {self.versions['torch']}" if "torch" in self.versions else ""
        yield Text(f"on {self.device}{torch}", style="dim")
        timed = [(row.milliseconds_median, row.milliseconds) for row in self.sides]
        slowdown = max((median / best for median, best in timed if median and best), default=1.0)
        if slowdown > _BUSY:
            yield Text(
                f"the machine is busy: the median is {slowdown:.1f} times the best time. Compare the best times, "
                "or measure again when nothing else runs.",
                style="yellow",
            )
        if left := describe_not_counted(made.more.get("not_counted", ())):
            yield Text(left, style="yellow")
        yield from made.lines
        yield from (Text(note, style="yellow") for note in self.notes)
        yield Text(f"wrote {self.file}", style="bold green")


def render_plan(plan: AnyPlan, *, all_nodes: bool) -> RenderableType:
    """Show a plan as a table; without `all_nodes`, dense nodes before the region are omitted. Plans of other methods
    are shown as text.

    The reason why an operation of the region is exact is stated once per operation, below the table.
    """
    if not isinstance(plan, Plan):
        return Text(str(plan))
    columns: list[Column[Decision]] = [
        Column("node", "node", False),
        Column("operation", "operation", False),
        Column("action", lambda row: Text(row.action, style=_STYLES.get(row.action, "dim")), False),
        Column("output stride", plan.stride_text, False),
        Column("MACs", lambda row: f"{row.macs:.2e}" if row.macs else ""),
        Column("reason", lambda row: "" if row.on_elements else plan.reason_text(row), False),
    ]
    shown = [row for row in plan.decisions if row.action != "dense" or all_nodes]
    reasons: dict[str, str] = {}
    for decision in plan.chosen("adapt", "keep"):
        reasons.setdefault(decision.operation.partition(" ")[0], decision.reason)
    explained = "\n".join(f"{operation}: {reason}" for operation, reason in reasons.items())
    return Group(Text(plan.summary()), table(shown, columns), Text(explained, style="dim"))


def render_macs(report: Any) -> RenderableType:
    """Show the MACs per layer and in total; for other methods as text."""
    if not isinstance(report, MacReport):
        return Text(str(report))
    columns: list[Column[LayerMacs]] = [
        Column("layer", lambda layer: layer.layer, False),
        Column("operation", lambda layer: layer.operation, False),
        Column("with mask", lambda layer: f"{layer.mask:.3e}"),
        Column("as given", lambda layer: number(layer.given, ".3e")),
        Column("of given", lambda layer: ratio(layer.mask, layer.given)),
        Column("everything high", lambda layer: f"{layer.high:.3e}"),
        Column("everything low", lambda layer: f"{layer.low:.3e}"),
    ]
    shown = table(report.layers, columns, str(report))
    shown.add_section()
    mask, given, high, low = (
        number(macs, ".5e") for macs in (report.mask, report.given, report.high, report.low)
    )
    shown.add_row("total", "", mask, given, ratio(report.mask, report.given), high, low, style="bold")
    return shown
