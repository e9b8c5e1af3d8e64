"""The plan of a network with exits, and the multiply-accumulates up to each exit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from cadsurgery.methods.report import MethodMacs, MethodPlan, in_words


@dataclass(frozen=True)
class ExitPlan:
    """The plan of one exit.

    Attributes:
        name: name of the module or node that it follows.
        branches: nodes of the maps it reads.
        channels: number of channels of all these maps.
        head: kind of its head, as text.
        macs: MACs of the segment before it and of its head, on the example, with everything computed.
        chosen: number of convolutions that are computed at undecided positions only.
        share: share of these convolutions in the MACs.
    """

    name: str
    branches: tuple[str, ...]
    channels: int
    head: str
    macs: int = field(compare=False)
    chosen: int = field(compare=False)
    share: float = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class AnytimePlan(MethodPlan):
    """The plan of all exits, the network's own head last.

    Attributes:
        exits: in execution order.
        classes: number of classes.
        whole: convolutions after the first exit that are still computed everywhere, with the reason.
    """

    exits: tuple[ExitPlan, ...]
    classes: int
    whole: tuple[tuple[str, str], ...] = field(compare=False)  # the wording may change

    def check(self) -> bool:
        """True if there is more than one exit."""
        return len(self.exits) > 1

    def __str__(self) -> str:
        total, lines = sum(exit.macs for exit in self.exits), list[str]()
        for number, exit in enumerate(self.exits, 1):
            passed = sum(exit.macs for exit in self.exits[:number])
            where = f"{exit.chosen} convolutions where it is not confident yet"
            lines.append(
                f"  {number} {exit.name}: {passed:.3e} ({passed / total:.0%} of all), {exit.channels} channels of "
                f"{len(exit.branches)} maps, {exit.head}; {where if number > 1 else 'computed everywhere'}"
            )
        lines += [f"  {name} is computed everywhere: {why}" for name, why in self.whole]
        title = f"{len(self.exits)} exits, {self.classes} classes; MACs on {in_words(self.example_shape)}"
        return "\n".join([title, *lines])


@dataclass(frozen=True)
class ExitMacs:
    """MACs of a batch up to and including an exit and its head.

    Attributes:
        exit: name of the exit.
        macs: MACs that are computed.
        dense: MACs with everything computed.
    """

    exit: str
    macs: int
    dense: int


@dataclass(frozen=True, kw_only=True)
class AnytimeMacs(MethodMacs):
    """MACs of a network up to each of its exits; `print` shows them.

    Attributes:
        exits: in execution order.
    """

    exits: tuple[ExitMacs, ...]
    told = ("mean",)

    def __iter__(self) -> Iterator[ExitMacs]:
        return iter(self.exits)

    def __getitem__(self, place: int) -> ExitMacs:
        return self.exits[place]

    def __len__(self) -> int:
        return len(self.exits)

    @property
    def total(self) -> int:
        """MACs up to the last exit."""
        return self.exits[-1].macs

    @property
    def dense(self) -> int:
        """MACs up to the last exit with everything computed."""
        return self.exits[-1].dense

    @property
    def mean(self) -> float:
        """Mean of the MACs up to each exit, as published."""
        return sum(exit.macs for exit in self.exits) / len(self.exits)

    def lines(self) -> list[str]:
        """Return the mean, then one line per exit."""
        shares = [
            f"{exit_plan.macs:.4e}, {exit_plan.macs / exit_plan.dense:.3f} of {exit_plan.dense:.4e}"
            for exit_plan in self.exits
        ]
        rows = [f"  {exit.exit}: {share}" for exit, share in zip(self.exits, shares, strict=True)]
        return [f", up to each exit; mean {self.mean:.4e}", *rows]
