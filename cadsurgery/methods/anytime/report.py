"""Plan of a network that can be left early, and the multiply-accumulates of its exits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from cadsurgery.methods.report import MethodMacs, MethodPlan, in_words


@dataclass(frozen=True)
class ExitPlan:
    """One exit.

    Attributes:
        name: of the module or node it comes after.
        branches: nodes of the maps it reads.
        channels: of all of them.
        head: what predicts, in words.
        macs: multiply-accumulates of the segment before it and of its head, on the example, with everything computed.
        chosen: how many convolutions are computed at the positions that are left.
        share: their share of these MACs.
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
    """All exits, the network's own last; a pure value.

    Attributes:
        exits: in order of execution.
        classes: that are predicted.
        whole: convolutions behind the first exit that are computed everywhere all the same, and why.
    """

    exits: tuple[ExitPlan, ...]
    classes: int
    whole: tuple[tuple[str, str], ...] = field(compare=False)  # words, which change

    def check(self) -> bool:
        """True if there are several exits."""
        return len(self.exits) > 1

    def __str__(self) -> str:
        total, lines = sum(exit.macs for exit in self.exits), list[str]()
        for number, exit in enumerate(self.exits, 1):
            passed = sum(one.macs for one in self.exits[:number])
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
    """MACs up to and including an exit and its head: of the batch that was counted.

    Attributes:
        exit: its name.
        macs: computed.
        dense: of the same network with everything computed.
    """

    exit: str
    macs: int
    dense: int


@dataclass(frozen=True, kw_only=True)
class AnytimeMacs(MethodMacs):
    """MACs of a network at each of its exits; `print` shows them.

    Attributes:
        exits: in order.
        rule: `conv`, multiply-accumulates that are carried out; or `published`, the counting of the reference code,
            which adds 49 for each channel of a convolution, by the share that is computed and the share that is not,
            for filling.
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
        """Up to the last exit."""
        return self.exits[-1].macs

    @property
    def dense(self) -> int:
        """Up to the last exit with everything computed."""
        return self.exits[-1].dense

    @property
    def mean(self) -> float:
        """Mean over the exits, as published."""
        return sum(exit.macs for exit in self.exits) / len(self.exits)

    def lines(self) -> list[str]:
        """The mean, then each exit."""
        shares = [f"{one.macs:.4e}, {one.macs / one.dense:.3f} of {one.dense:.4e}" for one in self.exits]
        rows = [f"  {exit.exit}: {share}" for exit, share in zip(self.exits, shares, strict=True)]
        return [f", up to each exit; mean {self.mean:.4e}", *rows]
