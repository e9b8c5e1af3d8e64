"""What became of a network that computes where gates are open: its branches and their gates."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from cadsurgery.support.plain import read_as


@dataclass(frozen=True)
class GatePlan:
    """One gate.

    Attributes:
        conv: the convolution that it decides of, by its module.
        stride: positions of the branch's input for each of the convolution's output, along an axis.
        follows: modules computed at the same positions behind it, before gaps are filled.
        macs: multiply-accumulates of all these on the example, computed everywhere.
    """

    conv: str
    stride: int
    follows: tuple[str, ...]
    macs: int = field(compare=False)


@dataclass(frozen=True)
class BranchPlan:
    """One branch.

    Attributes:
        name: of its module.
        source: node that its gates read.
        gates: in order of execution.
        apart: its convolutions without a gate, and why.
    """

    name: str
    source: str
    gates: tuple[GatePlan, ...]
    apart: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class SamplingPlan:
    """All branches; a pure value.

    Attributes:
        branches: in order of execution.
        macs: multiply-accumulates of the whole network on the example, gates not among them.
        gate_macs: those of the gates.
        example_shape: of the image it was observed on.
        part: name of the part that was converted, "" for the whole network.
    """

    branches: tuple[BranchPlan, ...]
    macs: int = field(compare=False)
    gate_macs: int = field(compare=False)
    example_shape: tuple[int, ...]
    part: str = ""

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> SamplingPlan:
        """The plan written by `to_json`.

        Raises:
            ValueError: a text that is no plan.
        """
        plan: SamplingPlan = read_as(SamplingPlan, json.loads(text), "the plan")
        if len(plan.example_shape) != 4 or min(plan.example_shape) < 1 or not plan.branches:
            raise ValueError("it is no plan of branches")
        return plan

    def __str__(self) -> str:
        gates = [gate for branch in self.branches for gate in branch.gates]
        share = sum(gate.macs for gate in gates) / self.macs if self.macs else 0.0
        size, within = "x".join(map(str, self.example_shape)), f"; all in {self.part}" if self.part else ""
        lines = [
            f"{len(self.branches)} branches, {len(gates)} gates decide of {share:.0%} of {self.macs:.3e} MACs on "
            f"{size}; the gates have {self.gate_macs:.3e}{within}"
        ]
        for branch in self.branches:
            lines.append(f"  {branch.name}, gates read {branch.source}")
            for gate in branch.gates:
                behind = f", then {', '.join(gate.follows)}" if gate.follows else ""
                strided = f", at stride {gate.stride}" if gate.stride > 1 else ""
                lines.append(f"    {gate.conv}{behind}: {gate.macs:.3e} MACs{strided}")
            lines += [f"    {name} is computed everywhere: {why}" for name, why in branch.apart]
        return "\n".join(lines)
