"""The plan: one decision per node, as an immutable value that can be printed, compared and stored as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Literal

from cadsurgery.elements.kernel_map import Window
from cadsurgery.support.counting import describe_not_counted
from cadsurgery.support.errors import UnknownName
from cadsurgery.support.plain import read_as

# If masks change the outputs by less than this share of their spread, the plan says so.
SMALL_EFFECT = 1e-3

Outputs = Literal["fine", "native"]
Leaves = Literal["", "fine", "native", "resized"]
Action = Literal["dense", "enter", "adapt", "keep", "exit", "barrier"]


@dataclass(frozen=True)
class Decision:
    """Decision about one node.

    Attributes:
        node: name in the graph.
        path: name of the module it belongs to.
        operation: description of the operation, e.g. `Conv2d 3x3/2`.
        action: `dense` (unchanged), `enter` (its dense result is read as elements), `adapt` (a strided
            operation made adaptive), `keep` (runs on elements unchanged), `exit` (reads maps that leave the
            region) or `barrier` (an operation that ends the region).
        reason: reason of the action.
        stages: stages of its input and its output.
        window: its kernel size, stride, padding and dilation, with its spacing in fine pixels.
        spacing: distance in fine pixels between the samples of its output in the original network.
        leaves: size at which its result leaves the region: `fine`, `native`, `resized` (a resize that reads elements),
            or "".
        macs: multiply-accumulates on the example in the original network.
        shape: shape of its output on the example in the original network.
        cost: for a node that ends the region, its MACs and those of all nodes that run dense because of it. Plans that
            differ only in `macs` and `cost` are equal, since a later version may count more operations.
        layout: axes of its output if it is a map, e.g. `bchw`; see `cadsurgery.layout`.
        after: true if it runs dense because its input has left the region.
        again: for a node that runs dense between two parts of the region, the operation that reads its samples as
            elements again; at every level they keep their own output stride. Else "".
        source: where the region ends, the line of the network's own code, e.g. `resnet.py:148`.
        inside_cells: true if its taps are closer together than the cells that it reads.
        of_copy: how the copy of the picture was moved that it reads, e.g. `flipped`: it runs dense, because the mask
            lies on the picture as it came. Else "".
    """

    node: str
    path: str
    operation: str
    action: Action
    reason: str
    stages: tuple[int, int] = (0, 0)
    window: Window | None = None
    spacing: int = 1
    leaves: Leaves = ""
    macs: int = field(default=0, compare=False)
    shape: tuple[int, ...] = ()
    cost: int = field(default=0, compare=False)
    layout: str = ""
    after: bool = False
    again: str = ""
    source: str = field(default="", compare=False)
    inside_cells: bool = False
    of_copy: str = ""

    @property
    def on_elements(self) -> bool:
        """True if the node runs on elements."""
        return self.action in ("adapt", "keep")

    @property
    def place(self) -> str:
        """The module, operation and source line, for messages."""
        return (
            f"{self.path or self.node} ({', '.join(part for part in (self.operation, self.source) if part)})"
        )


@dataclass(frozen=True)
class Considered:
    """An interpretation of a network's dilations that was considered: as removed strides or as the network's design.

    Attributes:
        output_stride: its default (high, low); None if nothing could be made adaptive.
        removed: the output strides whose removal the dilations indicate; empty if all dilations are by design.
        share: share of the network's MACs that would be in the region.
        evident: true if the network's structure shows that these strides were removed.
    """

    output_stride: tuple[int, int] | None
    removed: tuple[int, ...]
    share: float
    evident: bool

    def describe(self) -> str:
        """Return the interpretation in words."""
        if not self.removed:
            how = "dilations by design"
        else:
            how = f"dilations for removed strides to {self.removed[-1]}{', as the network is built' * self.evident}"
        if self.output_stride is None:
            return f"{how}: nothing would be adaptive"
        return f"{how}: output stride {self.output_stride}, {self.share:.0%} of the MACs in the region"


@dataclass(frozen=True)
class PlannedWork:
    """Multiply-accumulates of a planned network on one image.

    Attributes:
        given: of the network as given, or of its part that is converted.
        high: of the converted network with everything high.
        low: of the converted network with everything low.
        shape: shape of the image batch.
    """

    given: int
    high: int
    low: int
    shape: tuple[int, ...]

    @property
    def is_finer(self) -> bool:
        """True if the conversion makes maps finer than those of the network as given."""
        return self.high > self.given

    @property
    def _on(self) -> str:
        return f"(MACs on {'x'.join(map(str, self.shape))})"

    def describe_floors(self, low: int, part: str = "") -> str:
        """Return the work of a conversion with floors relative to the network as given, in words.

        Args:
            low: the floor.
            part: name of the converted part; empty for the whole network.
        """
        share = self.low / max(1, self.given)
        return (
            f"everything at the floor of {low} pixels takes {share:.2f} of the MACs of {_given(part)}, "
            f"{third_kept(share):.2f} where a third is kept; everything high takes "
            f"{_times(self.high, self.given)} {self._on}"
        )

    def describe(self, high: int, part: str = "") -> str:
        """Return the work relative to the network as given, in words.

        Args:
            high: the high output stride.
            part: name of the converted part; empty for the whole network.
        """
        on, given = self._on, _given(part)
        if self.is_finer:
            return (
                f"this makes maps finer: the same network at output stride {high} everywhere does "
                f"{_times(self.high, self.given)} times the work of {given}, everything low "
                f"{_times(self.low, self.given)} times; a mask lies between {on}"
            )
        return (
            f"everything high does {_times(self.high, self.given)} and everything low {_times(self.low, self.given)} "
            f"times the work of {given} {on}"
        )


@dataclass(frozen=True)
class Prospect:
    """Estimated work of a network with floors, as shares of the network as given.

    Attributes:
        coarsest: the floor, in input pixels.
        nothing_kept: with everything at the floor.
    """

    coarsest: int
    nothing_kept: float

    def describe(self) -> str:
        """Return the estimate in words."""
        return (
            f"for pictures that are mostly empty: coarsest={self.coarsest} takes about "
            f"{third_kept(self.nothing_kept):.2f} of the MACs of the network as given where a third is kept, "
            f"{self.nothing_kept:.2f} where nothing is"
        )


def _given(part: str) -> str:
    return f"the {part} as given" if part else "the network as given"


def third_kept(nothing_kept: float) -> float:
    """Return the share of MACs with a third of the picture kept, where everything kept takes 1."""
    return (1 + 2 * nothing_kept) / 3


def _times(macs: int, given: int) -> str:
    return f"{macs / max(1, given):.2f}"


@dataclass(frozen=True)
class Plan:
    """Plan of a conversion; `print(plan)` lists every decision.

    Attributes:
        decisions: one decision per node, in order of execution.
        output_stride: (high, low).
        strides: output strides of the lattices, from the high one to the network's lowest.
        identity_level: the level whose uniform map gives the original network: the lowest for a
            strided network, 0 for a dilated one, None if its own strides are not among the lattices.
        region: the requested region.
        possible: possible (high, low) pairs.
        example_shape: shape of the image that the plan was made with.
        outputs: node and output stride of each returned map.
        matters: true if a higher resolution can change the outputs. It cannot if every map leaves the region at its
            native size and no operation of the region (a mean over the image, a resize) carries finer values there.
            For a verified network this is the measured result.
        work: work of the conversion relative to the network as given; None if not counted, as in older files.
        effect: difference of the outputs between all cells high and all cells low on the example: rms, relative to the
            standard deviation of the output, for the output with the largest value; 0 if only rounding differs; None
            if not measured.
        finest: the finest output stride that can change the outputs.
        returned: size of maps that leave the region and are returned unchanged, `fine` or `native`.
        part: name of the converted part, if torch.fx cannot follow the whole network; else "".
        call: shapes and types of the example's arguments as JSON, if they are more than an image; else "".
        floors: true if maps become coarser than the network's own grid where the mask does not keep it, at most
            `output_stride[1]` pixels, instead of finer.
        considered: interpretations of the network's dilations, the planned one first; empty if there is only one.
        not_counted: operations that may multiply but are missing from all MACs, because they have no counting rule.
        around: input pixels by which paddings make the fine map longer than the image, which is in its middle.
        prospect: what floors would save instead; None in plans of floors, where floors would save nothing, and where it
            was not estimated.
    """

    decisions: tuple[Decision, ...]
    output_stride: tuple[int, int]
    strides: tuple[int, ...]
    identity_level: int | None
    region: str | tuple[str, ...]
    possible: tuple[tuple[int, int], ...]
    example_shape: tuple[int, ...]
    outputs: tuple[tuple[str, int], ...] = ()
    matters: bool = field(default=True, compare=False)
    finest: int = 0
    returned: Outputs = "fine"
    part: str = ""
    call: str = ""
    floors: bool = False
    considered: tuple[Considered, ...] = field(default=(), compare=False)
    not_counted: tuple[str, ...] = field(default=(), compare=False)
    effect: float | None = field(default=None, compare=False)
    work: PlannedWork | None = field(default=None, compare=False)
    prospect: Prospect | None = field(default=None, compare=False)
    around: int = 0

    def measured(self, effect: float | None) -> Plan:
        """Return the plan with a measured effect, see `effect`."""
        return self if effect is None else replace(self, effect=effect, matters=effect > 0)

    @property
    def stage_strides(self) -> tuple[int, ...]:
        """The stride of each adaptive stage."""
        return tuple(b // a for a, b in zip(self.strides, self.strides[1:], strict=False))

    @property
    def max_level(self) -> int:
        """The level of the low output stride, the largest number in a level map."""
        return self.strides.index(self.output_stride[1])

    def __getitem__(self, node: str) -> Decision:
        for decision in self.decisions:
            if decision.node == node:
                return decision
        raise UnknownName("node", node, [decision.node for decision in self.decisions])

    def chosen(self, *actions: Action) -> list[Decision]:
        """Return the decisions with one of these actions."""
        return [decision for decision in self.decisions if decision.action in actions]

    def share(self, *actions: Action) -> float:
        """Return the share of the original network's MACs (on the example) in nodes with these actions."""
        return _macs_of(self.chosen(*actions)) / max(1, _macs_of(self.decisions))

    @property
    def share_after_first_stage(self) -> float:
        """The region's share of all MACs from the first adaptive operation on, in order of execution."""
        adapted = (index for index, decision in enumerate(self.decisions) if decision.action == "adapt")
        behind = self.decisions[next(adapted, 0) :]
        total = _macs_of(behind)
        return _macs_of(d for d in behind if d.on_elements) / total if total else 1.0

    def standing(self) -> list[tuple[str, int, int, str]]:
        """Return for each output map: node, native output stride, returned output stride, size at the region's end."""
        high, outputs = self.strides[0], list[tuple[str, int, int, str]]()
        for name, grid in self.outputs:
            decision = self[name]
            staged = decision.on_elements and decision.stages[1] > 0
            fine = staged and decision.leaves == "fine"
            outputs.append((name, grid, high if fine else grid, decision.leaves or "dense"))
        return outputs

    @property
    def region_end(self) -> list[Decision]:
        """The decisions at which the region ends."""
        return self.chosen("exit", "barrier")

    @property
    def reads_inside_cells(self) -> bool:
        """True if the region continues through windows whose taps are closer together than the cells."""
        return any(decision.inside_cells for decision in self.decisions)

    @property
    def between(self) -> list[Decision]:
        """The decisions whose dense results are read as elements again."""
        return [decision for decision in self.decisions if decision.again]

    @property
    def dense_after(self) -> float:
        """The share of the network's MACs that run dense after the region."""
        after = (d for d in self.decisions if d.action in ("exit", "barrier") or d.after)
        return _macs_of(after) / max(1, _macs_of(self.decisions))

    def to_json(self) -> str:
        """Return the whole plan as JSON; `Plan.from_json` reads it back."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan written by `to_json`; fields with a default may be missing.

        Raises:
            Exception: of several types, if the text is not a plan.
        """
        values = json.loads(text)
        for decision in values["decisions"]:
            if "grid" in decision:  # the name until 0.2
                decision["spacing"] = decision.pop("grid")
        plan: Plan = read_as(Plan, values, "the plan")
        plan._check()
        return plan

    def _check(self) -> None:
        """Raise a ValueError if strides, stages or names contradict each other."""
        rising = all(1 <= a < b and b % a == 0 for a, b in pairwise(self.strides))
        levels, names = range(len(self.strides)), {decision.node for decision in self.decisions}
        stages = range(len(self.strides) + self.floors)
        if not self.strides or self.strides[0] < 1 or not rising:
            raise ValueError(f"strides {self.strides!r:.60}")
        if self.output_stride[0] != self.strides[0] or self.output_stride[1] not in self.strides:
            raise ValueError(f"output stride {self.output_stride} among {self.strides!r:.60}")
        if self.identity_level is not None and self.identity_level not in levels:
            raise ValueError(f"level {self.identity_level} of {len(levels)}")
        if len(self.example_shape) != 4 or min(self.example_shape) < 1:
            raise ValueError(f"an example of shape {self.example_shape!r:.60}")
        for decision in self.decisions:
            if any(stage not in stages for stage in decision.stages) or decision.macs < 0:
                raise ValueError(f"stages {decision.stages} or MACs {decision.macs} of {decision.node:.60}")
        for name, _ in self.outputs:
            if name not in names:
                raise ValueError(f"an output {name!r:.60} that has no decision")

    def __str__(self) -> str:
        header = ("node", "operation", "action", "output stride", "reason")
        rows = [header] + [
            (d.node, d.operation, d.action, self.stride_text(d), self.reason_text(d)) for d in self.decisions
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        table = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]).rstrip()
            for row in rows
        ]
        return "\n".join([self.summary(), "", *table])

    def summary(self) -> str:
        """Return a summary in a few lines: the adaptive operations, and where the region ends."""
        high, low = self.output_stride
        lines = [
            self._levels_in_words(),
            f"adaptive stages: {self.max_level}, from {' to '.join(map(str, self.strides[: self.max_level + 1]))}; "
            f"levels 0..{self.max_level}",
            f"{len(self.chosen('adapt'))} operations adapted, {len(self.chosen('keep'))} kept on elements, "
            f"{self.share('adapt', 'keep'):.0%} of the MACs in the region",
        ]
        if self.work is not None:
            text = (
                self.work.describe_floors(low, self.part)
                if self.floors
                else self.work.describe(high, self.part)
            )
            lines.insert(1, text)
        ends: dict[str, list[str]] = {}
        for decision in self.region_end:
            ends.setdefault(decision.reason, []).append(decision.node)
        for reason, names in ends.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"region ends at {', '.join(names[:3])}{more}: {reason}")
        for what in dict.fromkeys(decision.of_copy for decision in self.decisions if decision.of_copy):
            names = [decision.node for decision in self.decisions if decision.of_copy == what]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(
                f"dense on a {what} copy of the picture: {', '.join(names[:3])}{more}; the mask lies on the other one"
            )
        for decision in self.between:
            lines.append(
                f"dense between two parts of the region: {decision.node}, read again by {decision.again}; at every "
                "level its values stay at its own output stride, so what depends on them is not wholly the dense "
                "network at a finer one"
            )
        for output, native, stride, how in self.standing():
            if stride < native:
                lines.append(
                    f"output {output} (output stride {native}): returned at output stride {stride}; "
                    'outputs="native" keeps its size'
                )
            elif len(self.outputs) > 1:
                lines.append(f"output {output} (output stride {native}): {how}, at output stride {stride}")
        if self.effect is not None and self.hardly_matters:
            gain = "little" if self.effect else "nothing"
            lines.append(f"{self.effect_in_words}: keeping more high costs work and gains {gain}")
        elif not self.matters:
            lines.append(
                "what leaves the region does so at its native size, where every mask gives the same up to the "
                "approximation of merged cells: keeping more high costs work and gains nothing"
            )
        elif self.finest > high:
            lines.append(
                f"what leaves the region does so at output stride {self.finest}: keeping more than that costs work and "
                f"gains nothing; output_stride=({self.finest}, {low}) does without"
            )
        lines += [f"considered: {reading.describe()}" for reading in self._extremes()]
        if self.part:
            lines.insert(0, f"converted: {self.part}, inside a network that torch.fx cannot follow whole")
        if self.dense_after > 0:
            lines.append(f"{self.dense_after:.0%} of the MACs run dense after the region")
        lines += [self.prospect.describe()] if self.prospect is not None else []
        lines += filter(None, [describe_not_counted(self.not_counted)])
        return "\n".join(lines)

    def _levels_in_words(self) -> str:
        high, low = self.output_stride
        if self.floors:
            return f"every map as the network has it where the mask says so, none finer than {low} pixels elsewhere"
        own = f"{self.strides[self.identity_level]} is" if self.identity_level is not None else "neither is"
        return f"output stride {high} where the mask says so, {low} elsewhere ({own} the network's own)"

    @property
    def hardly_matters(self) -> bool:
        """True if masks change the outputs by less than `SMALL_EFFECT` of their spread, or not at all."""
        return not self.matters or (self.effect is not None and self.effect < SMALL_EFFECT)

    @property
    def effect_in_words(self) -> str:
        """The measured effect in words, see `effect`."""
        if not self.effect:
            return "on the example everything high and everything low return the same, up to rounding"
        return f"on the example everything high and everything low differ by {self.effect:.1e} of the output's spread"

    def _extremes(self) -> list[Considered]:
        """Return up to three interpretations: the planned one, those with the most and fewest removed strides."""
        by_number = sorted(self.considered, key=lambda one: one.removed[-1:])
        return list(dict.fromkeys((*self.considered[:1], *by_number[-1:], *by_number[:1])))

    def reason_text(self, decision: Decision) -> str:
        """Return the reason of a decision, and for an end of the region the share of MACs that run dense after it."""
        share = decision.cost / max(1, _macs_of(self.decisions))
        cost = f"; from here {share:.0%} of the MACs run dense" if decision.cost else ""
        return f"{decision.reason}{cost}"

    def stride_text(self, decision: Decision) -> str:
        """Return the output strides before and after a node, for tables."""
        if not decision.on_elements:
            return decision.leaves and f"-> {decision.leaves}"
        before, after = (self.strides[max(0, stage - self.floors)] for stage in decision.stages)
        return f"{before} -> {after}" if before != after else f"{after}"


def _macs_of(decisions: Iterable[Decision]) -> int:
    return sum(decision.macs for decision in decisions)
