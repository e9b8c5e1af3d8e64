"""Reports for people: rich tables of plans, MACs, times and checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cadsurgery.network.macs import MacReport
from cadsurgery.surgery.plan import Plan
from cadsurgery.surgery.verify import Check


@dataclass(frozen=True)
class Side:
    """One line of a comparison: a network, its MACs and its time."""

    name: str
    macs: int
    milliseconds: float | None


@dataclass(frozen=True)
class ConversionReport:
    """What `cadsurgery convert` tells.

    Attributes:
        model: source of the network.
        weights: which weights it has, in words.
        random: whether they are random.
        mask: spec of the mask.
        plan: of the conversion.
        active_fraction: of the mask on the image.
        image: shape of the image batch.
        sides: original, dense high if that is another network, converted, optimised.
        checks: laws verified; empty if not.
        device: in words.
        file: written, or "".
        notes: what a user can act on.
        costs: of convolutions that decided, see `backends.costs.record`.
    """

    model: str
    weights: str
    random: bool
    mask: str
    plan: Plan
    active_fraction: float
    image: tuple[int, ...]
    sides: tuple[Side, ...]
    checks: tuple[Check, ...]
    device: str
    file: str = ""
    notes: tuple[str, ...] = field(default=())
    costs: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for `--json`."""
        return {
            "model": self.model,
            "weights": self.weights,
            "random_weights": self.random,
            "mask": self.mask,
            "output_stride": list(self.plan.output_stride),
            "region_ends": [f"{d.node}: {d.reason}" for d in self.plan.region_end],
            "adapted": [d.node for d in self.plan.chosen("adapt")],
            "share_of_macs_in_region": self.plan.share("adapt", "keep"),
            "active_fraction": self.active_fraction,
            "image": list(self.image),
            "sides": [vars(side) for side in self.sides],
            "checks": [{**vars(check), "passed": check.passed} for check in self.checks],
            "device": self.device,
            "file": self.file,
            "notes": list(self.notes),
            "costs": self.costs,
        }

    def render(self) -> RenderableType:
        """The report for a terminal."""
        parts: list[RenderableType] = [
            Text(f"{self.model}, {self.weights}", style="bold red" if self.random else "bold")
        ]
        parts.append(Text(self.plan.summary()))
        parts.append(Text(f"adapted: {', '.join(d.node for d in self.plan.chosen('adapt'))}", style="dim"))
        size = f"{self.image[2]}x{self.image[3]}"
        table = Table(
            title=f"{self.image[0]} image of {size}, mask {self.mask}, on {self.device}", title_justify="left"
        )
        for column in ("network", "MACs", "of high", "ms", "of high"):
            table.add_column(column, justify="left" if column == "network" else "right")
        high = next(side for side in self.sides if "high" in side.name)
        for side in self.sides:
            timed = side.milliseconds is not None and high.milliseconds is not None
            table.add_row(
                side.name,
                f"{side.macs:.3e}",
                f"{side.macs / high.macs:.2f}",
                f"{side.milliseconds:.0f}" if side.milliseconds is not None else "-",
                f"{side.milliseconds / high.milliseconds:.2f}" if timed else "-",  # type: ignore[operator]
            )
        parts.append(table)
        parts.append(Text(f"active fraction {self.active_fraction:.3f} (share of the fine map kept high)"))
        parts.append(render_checks(self.checks))
        parts.extend(Text(note, style="yellow") for note in self.notes)
        if self.file:
            parts.append(Text(f"wrote {self.file}", style="bold green"))
        return Group(*parts)


def render_checks(checks: Sequence[Check]) -> RenderableType:
    """One line per verified law."""
    if not checks:
        return Text("not verified", style="yellow")
    lines = [f"verified: {c.law} (error {c.error:.1e}, allowed {c.tolerance:.0e})" for c in checks]
    return Text("\n".join(lines), style="green")


def render_plan(plan: Plan, *, all_nodes: bool = False) -> RenderableType:
    """The plan as a table; without `all_nodes`, dense nodes before the region are left out.

    Why an operation of the region is exact is told once per operation, below the table.
    """
    table = Table(title_justify="left")
    for column in ("node", "operation", "action", "output stride", "MACs", "reason"):
        table.add_column(column, overflow="fold", justify="right" if column == "MACs" else "left")
    styles = {
        "adapt": "bold green",
        "keep": "green",
        "barrier": "bold red",
        "exit": "yellow",
        "enter": "cyan",
    }
    reasons: dict[str, str] = {}
    for decision in plan.decisions:
        if decision.action == "dense" and not all_nodes:
            continue
        if inside := decision.action in ("adapt", "keep"):
            reasons.setdefault(decision.operation.partition(" ")[0], decision.reason)
        table.add_row(
            decision.node,
            decision.operation,
            Text(decision.action, style=styles.get(decision.action, "dim")),
            plan.stride_text(decision),
            f"{decision.macs:.2e}" if decision.macs else "",
            "" if inside else plan.reason_text(decision),
        )
    told = Text("\n".join(f"{operation}: {reason}" for operation, reason in reasons.items()), style="dim")
    return Group(Text(plan.summary()), table, told)


def render_macs(report: MacReport, *, layers: bool = True) -> RenderableType:
    """MACs per layer and in total."""
    table = Table(title=str(report), title_justify="left")
    for column in ("layer", "operation", "with mask", "dense high", "dense low", "of high"):
        table.add_column(column, justify="left" if column in ("layer", "operation") else "right")
    for layer in report.layers if layers else ():
        share = f"{layer.mask / layer.high:.2f}" if layer.high else "-"
        table.add_row(
            layer.layer, layer.operation, f"{layer.mask:.3e}", f"{layer.high:.3e}", f"{layer.low:.3e}", share
        )
    table.add_section()
    total = f"{report.mask / report.high:.2f}" if report.high else "-"
    table.add_row(
        "total", "", f"{report.mask:.5e}", f"{report.high:.5e}", f"{report.low:.5e}", total, style="bold"
    )
    return table
