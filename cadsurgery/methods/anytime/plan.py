"""What became of a network that can be left early: its exits, and what is computed at chosen positions alone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from cadsurgery.support.plain import read_as


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
    chosen: int
    share: float = field(compare=False)


@dataclass(frozen=True)
class AnytimePlan:
    """All exits, the network's own last; a pure value.

    Attributes:
        exits: in order of execution.
        classes: that are predicted.
        whole: convolutions behind the first exit that are computed everywhere all the same, and why.
        example_shape: of the image it was observed on.
    """

    exits: tuple[ExitPlan, ...]
    classes: int
    whole: tuple[tuple[str, str], ...]
    example_shape: tuple[int, ...]

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> AnytimePlan:
        """The plan written by `to_json`.

        Raises:
            ValueError: a text that is no plan.
        """
        plan: AnytimePlan = read_as(AnytimePlan, json.loads(text), "the plan")
        if len(plan.example_shape) != 4 or min(plan.example_shape) < 1 or len(plan.exits) < 2:
            raise ValueError("it is no plan of several exits")
        return plan

    def __str__(self) -> str:
        total = sum(exit.macs for exit in self.exits)
        lines = [
            f"{len(self.exits)} exits, {self.classes} classes; MACs on {'x'.join(map(str, self.example_shape))}"
        ]
        passed = 0
        for number, exit in enumerate(self.exits, 1):
            passed += exit.macs
            how = (
                f"{exit.chosen} convolutions where it is not confident yet"
                if number > 1
                else "computed everywhere"
            )
            lines.append(
                f"  {number} {exit.name}: {passed:.3e} ({passed / total:.0%} of all), {exit.channels} channels of "
                f"{len(exit.branches)} maps, {exit.head}; {how}"
            )
        lines += [f"  {name} is computed everywhere: {why}" for name, why in self.whole]
        return "\n".join(lines)
