"""Multiply-accumulates up to each exit, with everything computed and where the exits before left something."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from cadsurgery.support.counting import describe_not_counted

RULES = ("conv", "published")


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


@dataclass(frozen=True)
class AnytimeMacs:
    """MACs of a network at each of its exits; `print` shows them.

    Attributes:
        exits: in order.
        rule: `conv`, multiply-accumulates that are carried out; or `published`, the counting of the reference code,
            which adds 49 for each channel of a convolution, by the share that is computed and the share that is not,
            for filling.
        shape: of the image batch.
        not_counted: operations that may multiply and are in none of these numbers, because no rule says how much.
    """

    exits: tuple[ExitMacs, ...]
    rule: str
    shape: tuple[int, ...]
    not_counted: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[ExitMacs]:
        return iter(self.exits)

    def __getitem__(self, place: int) -> ExitMacs:
        return self.exits[place]

    def __len__(self) -> int:
        return len(self.exits)

    @property
    def mean(self) -> float:
        """Mean over the exits, as published."""
        return sum(exit.macs for exit in self.exits) / len(self.exits)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"mean": self.mean}

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        rows = [
            f"  {exit.exit}: {exit.macs:.4e}, {exit.macs / exit.dense:.3f} of {exit.dense:.4e}"
            for exit in self.exits
        ]
        title = f"MACs on {size} ({self.rule} rule), up to each exit; mean {self.mean:.4e}"
        return "\n".join(filter(None, [title, *rows, describe_not_counted(self.not_counted)]))
