"""What `cadsurgery convert`, `plan` and `macs` tell: plans, MACs, times and checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from cadsurgery.network.macs import LayerMacs, MacReport
from cadsurgery.surgery.plan import Decision, Plan
from cadsurgery.surgery.verify import Check
from cadsurgery.tasks.report import Column, Plain, RunReport, heading, number, ratio, table


@dataclass(frozen=True)
class Side(Plain):
    """One line of a comparison: a network, its MACs and its time."""

    name: str
    macs: int
    milliseconds: float | None


@dataclass(frozen=True, kw_only=True)
class ConversionReport(RunReport):
    """What `cadsurgery convert` tells.

    `normalisation` is what the mask takes the input for, and where that is known from, `image` is the shape of the
    batch, `sides` are the original if it is not dense high, then always dense high, converted, optimised, and in 8 bits
    if that was asked for; `checks` is empty if no law was verified. `costs` are those of convolutions that decided, see
    `backends.costs.record`.
    """

    model: str
    weights: str
    random: bool
    mask: str
    normalisation: str
    plan: Plan
    active_fraction: float
    image: tuple[int, ...]
    sides: tuple[Side, ...]
    checks: tuple[Check, ...]
    file: str = ""
    notes: tuple[str, ...] = ()
    costs: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for `--json`: of the plan what it comes to, and of each check whether it was passed."""
        return {
            **{name: value for name, value in super().to_dict().items() if name != "plan"},
            "output_stride": list(self.plan.output_stride),
            "region_ends": [f"{d.node}: {d.reason}" for d in self.plan.region_end],
            "adapted": [d.node for d in self.plan.chosen("adapt")],
            "share_of_macs_in_region": self.plan.share("adapt", "keep"),
            "checks": [{**vars(check), "passed": check.passed} for check in self.checks],
        }

    def parts(self) -> Iterator[RenderableType]:
        """Network, plan, the sides beside each other, laws and notes."""
        yield heading(self.model, self.weights, self.random)
        yield Text(self.plan.summary())
        yield Text(f"adapted: {', '.join(d.node for d in self.plan.chosen('adapt'))}", style="dim")
        size, high = f"{self.image[2]}x{self.image[3]}", self.sides[self.plan.identity_level != 0]
        columns: list[Column[Side]] = [
            Column("network", lambda side: side.name, False),
            Column("MACs", lambda side: f"{side.macs:.3e}"),
            Column("of high", lambda side: f"{side.macs / high.macs:.2f}"),
            Column("ms", lambda side: number(side.milliseconds)),
            Column("of high", lambda side: ratio(side.milliseconds, high.milliseconds)),
        ]
        yield table(self.sides, columns, f"{self.image[0]} image of {size}, mask {self.mask}")
        yield self.run_with()
        yield Text(f"active fraction {self.active_fraction:.3f} (share of the fine map kept high)")
        yield Text(f"masks see {self.normalisation}", style="dim")
        for check in self.checks:
            allowed = f"error {check.error:.1e}, allowed {check.tolerance:.0e}"
            yield Text(f"verified: {check.law} ({allowed})", style="green")
        if not self.checks:
            yield Text("not verified", style="yellow")
        yield from (Text(note, style="yellow") for note in self.notes)
        if self.file:
            yield Text(f"wrote {self.file}", style="bold green")


_STYLES = {"adapt": "bold green", "keep": "green", "barrier": "bold red", "exit": "yellow", "enter": "cyan"}


def render_plan(plan: Any, *, all_nodes: bool = False) -> RenderableType:
    """The plan as a table; without `all_nodes`, dense nodes before the region are left out. Of another method in words.

    Why an operation of the region is exact is told once per operation, below the table.
    """
    if not isinstance(plan, Plan):
        return Text(str(plan))
    columns: list[Column[Decision]] = [
        Column("node", lambda d: d.node, False),
        Column("operation", lambda d: d.operation, False),
        Column("action", lambda d: Text(d.action, style=_STYLES.get(d.action, "dim")), False),
        Column("output stride", plan.stride_text, False),
        Column("MACs", lambda d: f"{d.macs:.2e}" if d.macs else ""),
        Column("reason", lambda d: "" if d.action in ("adapt", "keep") else plan.reason_text(d), False),
    ]
    shown = [decision for decision in plan.decisions if decision.action != "dense" or all_nodes]
    reasons: dict[str, str] = {}
    for decision in plan.chosen("adapt", "keep"):
        reasons.setdefault(decision.operation.partition(" ")[0], decision.reason)
    told = Text("\n".join(f"{operation}: {reason}" for operation, reason in reasons.items()), style="dim")
    return Group(Text(plan.summary()), table(shown, columns), told)


def render_macs(report: Any, *, layers: bool = True) -> RenderableType:
    """MACs per layer and in total; of another method in words."""
    if not isinstance(report, MacReport):
        return Text(str(report))
    columns: list[Column[LayerMacs]] = [
        Column("layer", lambda layer: layer.layer, False),
        Column("operation", lambda layer: layer.operation, False),
        Column("with mask", lambda layer: f"{layer.mask:.3e}"),
        Column("dense high", lambda layer: f"{layer.high:.3e}"),
        Column("dense low", lambda layer: f"{layer.low:.3e}"),
        Column("of high", lambda layer: ratio(layer.mask, layer.high)),
    ]
    shown = table(report.layers if layers else (), columns, str(report))
    shown.add_section()
    totals = (f"{macs:.5e}" for macs in (report.mask, report.high, report.low))
    shown.add_row("total", "", *totals, ratio(report.mask, report.high), style="bold")
    return shown
