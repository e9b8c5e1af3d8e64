"""Plan and multiply-accumulates of a sampled network, which computes where gates are open."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from cadsurgery.methods.report import MethodMacs, MethodPlan, in_words


@dataclass(frozen=True)
class GatePlan:
    """One gate.

    Attributes:
        conv: module path of the gated convolution.
        stride: positions of the branch's input per position of the convolution's output, along an axis.
        follows: modules after the convolution that are computed at the same positions, before gaps are filled.
        macs: multiply-accumulates of all these modules on the example, computed everywhere.
    """

    conv: str
    stride: int
    follows: tuple[str, ...] = field(compare=False)
    macs: int = field(compare=False)


@dataclass(frozen=True)
class BranchPlan:
    """One branch.

    Attributes:
        name: name of the branch's module.
        source: node that the gates read.
        gates: gates in order of execution.
        apart: convolutions without a gate, and the reasons.
    """

    name: str
    source: str
    gates: tuple[GatePlan, ...]
    apart: tuple[tuple[str, str], ...] = field(compare=False)  # the wording may change


@dataclass(frozen=True, kw_only=True)
class SamplingPlan(MethodPlan):
    """All gated branches of a network, as an immutable value.

    Attributes:
        branches: branches in order of execution.
        macs: multiply-accumulates of the whole network on the example, without the gates.
        gate_macs: multiply-accumulates of the gates on the example.
    """

    branches: tuple[BranchPlan, ...]
    macs: int = field(compare=False)
    gate_macs: int = field(compare=False)

    def check(self) -> bool:
        """Return True if there are branches."""
        return bool(self.branches)

    def __str__(self) -> str:
        gates = [gate for branch in self.branches for gate in branch.gates]
        share = sum(gate.macs for gate in gates) / self.macs if self.macs else 0.0
        within = f"; all in {self.part}" if self.part else ""
        lines = [
            f"{len(self.branches)} branches, {len(gates)} gates decide of {share:.0%} of {self.macs:.3e} MACs on "
            f"{in_words(self.example_shape)}; the gates have {self.gate_macs:.3e}{within}"
        ]
        for branch in self.branches:
            lines.append(f"  {branch.name}, gates read {branch.source}")
            for gate in branch.gates:
                behind = f", then {', '.join(gate.follows)}" if gate.follows else ""
                strided = f", at stride {gate.stride}" if gate.stride > 1 else ""
                lines.append(f"    {gate.conv}{behind}: {gate.macs:.3e} MACs{strided}")
            lines += [f"    {name} is computed everywhere: {why}" for name, why in branch.apart]
        return "\n".join(lines)


@dataclass(frozen=True)
class GateMacs:
    """Multiply-accumulates of one gate and its chain, for the whole batch.

    Attributes:
        conv: module path of the convolution.
        density: share of the convolution's positions that were computed.
        macs: MACs of the chain at open positions.
        dense: MACs of the chain computed everywhere.
        gate: MACs of the gate itself.
    """

    conv: str
    density: float
    macs: int
    dense: int
    gate: int


@dataclass(frozen=True, kw_only=True)
class SampledMacs(MethodMacs):
    """MACs of a network; `print` shows them.

    Attributes:
        gates: MACs of each gate, in order of execution.
        rest: MACs of everything that no gate controls.
    """

    gates: tuple[GateMacs, ...]
    rest: int
    told = ("total", "dense", "density")

    def __iter__(self) -> Iterator[GateMacs]:
        return iter(self.gates)

    @property
    def total(self) -> int:
        """MACs of the sampled network, including gates."""
        return self.rest + sum(gate.macs + gate.gate for gate in self.gates)

    @property
    def dense(self) -> int:
        """MACs of the network without gates."""
        return self.rest + sum(gate.dense for gate in self.gates)

    @property
    def density(self) -> float:
        """Share of positions that were computed, weighted by their MACs."""
        dense = sum(gate.dense for gate in self.gates)
        return sum(gate.macs for gate in self.gates) / dense if dense else 1.0

    def lines(self) -> list[str]:
        """Return the lines of the report: the total, then each gate."""
        (first,), own = super().lines(), sum(gate.gate for gate in self.gates)
        rows = [f"  {gate.conv}: {gate.density:.3f} of its positions, {gate.macs:.3e}" for gate in self.gates]
        return [f"{first}; gates {own:.3e}", *rows]
