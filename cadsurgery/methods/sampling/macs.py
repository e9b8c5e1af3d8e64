"""Multiply-accumulates of a sampled network: with everything computed, and where its gates were open."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from cadsurgery.methods.sampling.branches import CHANNELS_FIRST
from cadsurgery.methods.sampling.program import Program, Segment
from cadsurgery.methods.steps import call
from cadsurgery.network.macs import to_meta
from cadsurgery.support.counting import MacCounter, describe_not_counted

RULES = ("conv", "published")
_TAPS = 49  # of the Gaussian
_GATE_TAPS = 9


@dataclass(frozen=True)
class GateMacs:
    """What one gate decides of: of the batch that was counted.

    Attributes:
        conv: the convolution.
        density: share of its positions that were computed.
        macs: computed where it was open, of the convolution and what follows it there.
        dense: the same computed everywhere.
        gate: of the gate itself.
        filling: of the filling, where the rule counts it.
    """

    conv: str
    density: float
    macs: int
    dense: int
    gate: int
    filling: int


@dataclass(frozen=True)
class SampledMacs:
    """MACs of a network; `print` shows them.

    Attributes:
        gates: in order of execution.
        rest: of everything that no gate decides of.
        rule: `conv`, multiply-accumulates of convolutions and products where they are needed, the gates' at each
            position of what they read; or `published`, the counting of the reference code: gates at the positions of
            what they decide of, and 49 for each channel that is filled, by the share that is computed and that is not.
        shape: of the image batch.
        not_counted: operations that may multiply and are in none of these numbers, because no rule says how much.
    """

    gates: tuple[GateMacs, ...]
    rest: int
    rule: str
    shape: tuple[int, ...]
    not_counted: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[GateMacs]:
        return iter(self.gates)

    @property
    def total(self) -> int:
        """All that is computed."""
        return self.rest + sum(gate.macs + gate.gate + gate.filling for gate in self.gates)

    @property
    def dense(self) -> int:
        """Of the network without gates."""
        return self.rest + sum(gate.dense for gate in self.gates)

    @property
    def density(self) -> float:
        """Share of the positions that were computed, by the work at each."""
        dense = sum(gate.dense for gate in self.gates)
        return sum(gate.macs for gate in self.gates) / dense if dense else 1.0

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"total": self.total, "dense": self.dense, "density": self.density}

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        own = sum(gate.gate for gate in self.gates)
        lines = [
            f"MACs on {size} ({self.rule} rule): {self.total:.4e}, {self.total / max(self.dense, 1):.3f} of "
            f"{self.dense:.4e}; gates {own:.3e}, filling {sum(gate.filling for gate in self.gates):.3e}"
        ]
        lines += [
            f"  {gate.conv}: {gate.density:.3f} of its positions, {gate.macs:.3e}" for gate in self.gates
        ]
        return "\n".join(filter(None, [*lines, describe_not_counted(self.not_counted)]))


@dataclass(frozen=True)
class Work:
    """The work of a call with everything computed.

    Attributes:
        steps: multiply-accumulates by step.
        shapes: of the values of each step that are tensors.
        not_counted: operations that are not among the multiply-accumulates, because no rule says how much.
    """

    steps: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    not_counted: list[str]


def work_of(program: Program, ghost: nn.Module, arguments: dict[str, Any]) -> Work:
    """What a call with such arguments costs, on a network without values."""
    found, env = Work({}, {}, []), dict[str, Any]()
    arguments = tree_map(to_meta, arguments)
    with torch.no_grad(), MacCounter() as counter:
        for item in program.items:
            for step in item.run.steps if isinstance(item.run, Segment) else (item.run,):
                before = counter.macs
                env[step.name] = value = to_meta(call(ghost, step, env.__getitem__, arguments))
                found.steps[step.name] = counter.macs - before
                if isinstance(value, Tensor):
                    found.shapes[step.name] = tuple(value.shape)
            for name in item.frees:
                del env[name]
    found.not_counted.extend(sorted(counter.not_counted))
    return found


def count(
    program: Program, work: Work, densities: dict[int, float], rule: str, shape: tuple[int, ...]
) -> SampledMacs:
    """The MACs of a call, by how large a share of its positions each gate chose."""
    source = {gate: name for name, gates in program.at.items() for gate in gates}
    rows, inside = dict[int, GateMacs](), set[str]()
    for item in program.items:
        if not isinstance(segment := item.run, Segment):
            continue
        gate, steps = segment.gate, (segment.conv, *segment.tail, *segment.end)
        inside.update(step.name for step in steps)
        dense, density = sum(work.steps[step.name] for step in steps), densities[gate]
        batch, channels, height, width = work.shapes[source[gate]]
        own, filling = batch * height * width * channels * _GATE_TAPS, 0.0
        if rule == "published":
            filled = work.shapes[(segment.end or (segment.fill,))[-1].name]
            values = filled[1] if segment.layout == CHANNELS_FIRST else filled[3]
            pixels = math.prod(filled) // values
            own = pixels * channels * _GATE_TAPS
            filling = _TAPS * values * pixels * density * (1 - density)
        rows[gate] = GateMacs(
            program.gates[gate].path, density, round(dense * density), dense, own, round(filling)
        )
    rest = sum(macs for name, macs in work.steps.items() if name not in inside)
    gates = tuple(rows[gate] for gate in sorted(rows))
    return SampledMacs(gates, rest, rule, shape, tuple(work.not_counted))
