"""Networks with gates by name and file: converted, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.methods.sampling import SampledModel, sample
from cadsurgery.methods.sampling.storage import NAME
from cadsurgery.support.divergence import tensors_of
from cadsurgery.support.errors import CannotConvert
from cadsurgery.tasks.by_method import Calls, Conversion, MethodReport, open_method


def open_gates(network: object, trust: bool = False) -> SampledModel | None:
    """A network with gates, or that of a file; None if it is no such."""
    net: SampledModel | None = open_method(network, SampledModel, NAME, trust)
    return net


@dataclass(frozen=True, kw_only=True)
class GatesReport(MethodReport):
    """What `cadsurgery convert --method sampling` tells.

    `sides` are the original, the network with its gates open as they start, both as they are and optimised; and the
    optimised copy with everything closed but the grid: what training lies between.
    """

    is_verified: bool

    def verified(self) -> str:
        """Of a conversion that was."""
        return "with open gates it is the original, bit for bit" if self.is_verified else ""

    def new(self) -> str:
        """The gates."""
        return "gates start open: train them with cadsurgery finetune --train gates"


def convert_gates(*, options: Mapping[str, Any], verify: bool, **told: Any) -> GatesReport:
    """Build, add gates, verify, measure and save; see `cadsurgery convert --help`.

    Args:
        options: of `cadsurgery.sample`.
        verify: whether the original is compared.
        told: of `Conversion.begin`.

    Raises:
        CannotConvert: with open gates the network is not the original.
    """
    conversion = Conversion.begin(NAME, **told)
    before, batch = conversion.before, conversion.batch
    conversion.step("adding gates")
    net = sample(before, **options)
    if verify:
        _check_open(before, net, batch)
    fast, closed = net.optimize(), net.optimize()
    for gate in closed.gates:
        gate.bias.data.neg_()
    counted, least = net.macs(batch), closed.macs(batch)
    calls: Calls = {
        "original": (counted.dense, before),
        "gates open": (counted.total, net),
        "original, optimised": (counted.dense, fast.dense),
        "gates open, net.optimize()": (counted.total, fast),
        "all closed but the grid, net.optimize()": (least.total, closed),
    }
    return GatesReport(**conversion.end(net, calls), is_verified=verify)


def _check_open(before: nn.Module, net: SampledModel, batch: Tensor) -> None:
    with torch.inference_mode():
        found, expected = tensors_of(net(batch)), tensors_of(before(batch))
    same = len(found) == len(expected) and all(map(torch.equal, found, expected))
    if not same:
        raise CannotConvert(
            "with all gates open the network is not the original.",
            where=net.plan.branches[0].name,
            why="what it returns on the image differs.",
            next="report it, with the network; --no-verify converts all the same.",
        )
