"""Sides of a network with gates: the dense network, its own gates, and gates opened at shares of positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from rich.text import Text
from torch import Tensor, nn

from cadsurgery.data import SegmentationData
from cadsurgery.data.networks import source_of
from cadsurgery.methods.sampling import SampledModel, sample
from cadsurgery.methods.sampling.gates import Opened
from cadsurgery.methods.side import (
    Comparison,
    ConversionRequest,
    Counts,
    MethodConversion,
    MethodSides,
    Side,
    Timed,
    once_per_batch,
)
from cadsurgery.support.divergence import maps_of, tensors_of
from cadsurgery.support.errors import CannotConvert, InvalidInput
from cadsurgery.support.fields import Reader, read_names, read_switch
from cadsurgery.support.rows import Row, accuracy_columns, macs_columns, time_columns
from cadsurgery.support.tables import Column

DENSE, GATES = "dense", "its gates"
CLOSED, OPEN = "all closed but the grid", "all open"


# -- evaluating ----------------------------------------------------------------------------------------


def compare(net: SampledModel, data: SegmentationData, thresholds: Sequence[Any] = ()) -> Comparison:
    """Return the sides: the dense network, and the network with its gates.

    Rows have the `density`, the share of positions that are computed, weighted by the MACs of each, mean over images.
    MACs include those of the gates.
    """
    fast = net.optimize()
    macs_of = once_per_batch(fast.macs)

    def count(images: Tensor) -> Counts:
        counted = macs_of(images)
        return {"macs": counted.total, "density": counted.density * len(images)}

    def count_dense(images: Tensor) -> Counts:
        return {"macs": macs_of(images).dense, "density": len(images)}

    sides = [
        Side(DENSE, lambda x: maps_of(fast.dense(x))[-1], count_dense, anchor=True),
        Side(GATES, lambda x: maps_of(fast(x))[-1], count),
    ]
    return Comparison(source_of(net), sides, _columns, "setting")


def _columns(report: Any) -> Iterator[Column[Row]]:
    dense = report.rows[0]
    yield Column("network", "setting", False)
    yield Column("open", "density", form=".3f")
    yield from accuracy_columns()
    yield from macs_columns("given", lambda row: dense, ".3f")
    yield from time_columns("given", lambda row: dense)


# -- timing --------------------------------------------------------------------------------------------


def _opened(net: SampledModel, opened: Opened, run: Callable[[Tensor], Any], images: Tensor) -> Any:
    """Run the network, or count, with gates open at a share of their positions."""
    net.score_override = opened
    try:
        return run(images)
    finally:
        net.score_override = None


def time(net: SampledModel, images: Tensor, fractions: Sequence[float]) -> Timed:
    """Return the sides: the dense network, its own gates, and gates opened at shares of their positions, from 0 to 1.

    Raises:
        InvalidInput: a share is below 0 or above 1.
    """
    if not all(0 <= fraction <= 1 for fraction in fractions):
        raise InvalidInput(
            f"the fractions are {', '.join(f'{fraction:g}' for fraction in fractions)}.",
            next="give shares of open positions from 0 to 1, e.g. 0.5,0.3.",
        )
    fast = net.optimize()
    counted = fast.macs(images)
    sides = [
        Side("as it was, optimised", fast.dense, counted.dense, anchor=True),
        Side("its own gates", fast, counted.total),
    ]
    for share in sorted({0.0, *map(float, fractions), 1.0}):
        name, opened = {0.0: CLOSED, 1.0: OPEN}.get(share, f"{share:g} open, in areas"), Opened(share)
        macs = _opened(fast, opened, fast.macs, images).total
        sides.append(Side(name, partial(_opened, fast, opened, fast), macs))
    return Timed(sides, counted.not_counted, (CLOSED, OPEN))


# -- converting ----------------------------------------------------------------------------------------


def convert(request: ConversionRequest) -> MethodConversion:
    """Add gates. They start open, so the network computes the same as the original, bit for bit.

    The sides are the original network and the network with open gates, both also optimised, and the optimised copy
    with all gates closed except for the grid. A trained network lies between open and closed.

    Raises:
        CannotConvert: with open gates the network differs from the original.
    """
    before, batch = request.before, request.batch(request.source)
    request.step("adding gates")
    net = sample(before, **request.options)
    _check_open(before, net, batch)
    fast, closed = net.optimize(), net.optimize()
    for gate in closed.gates:
        gate.bias.data.neg_()
    counted, least = net.macs(batch), closed.macs(batch)
    sides = [
        Side("original", before, counted.dense),
        Side("gates open", net, counted.total),
        Side("original, optimised", fast.dense, counted.dense),
        Side("gates open, net.optimize()", fast, counted.total),
        Side("all closed but the grid, net.optimize()", closed, least.total),
    ]
    verified = Text("verified: with open gates it is the original, bit for bit", style="green")
    untrained = Text(
        "gates start open: train them with cadsurgery finetune --set train=gates", style="yellow"
    )
    more = {"is_verified": True, "not_counted": counted.not_counted}
    return MethodConversion(net, batch, sides, more, Text(str(net.plan)), [verified, untrained])


def _check_open(before: nn.Module, net: SampledModel, batch: Tensor) -> None:
    with torch.inference_mode():
        output, expected = tensors_of(net(batch)), tensors_of(before(batch))
    same = len(output) == len(expected) and all(map(torch.equal, output, expected))
    if not same:
        raise CannotConvert(
            "with all gates open the network is not the original.",
            where=net.plan.branches[0].name,
            why="what it returns on the image differs.",
            next="report it, with the network; cs.sample(model) converts all the same, in Python.",
        )


def run(net: SampledModel, batch: Tensor, milliseconds: float) -> tuple[Any, dict[str, Any]]:
    """Return the output, and the share of positions that were computed."""
    output, densities = net(batch), net.densities.values()
    return output, {"density": sum(densities) / len(densities)}


_SETTINGS: dict[str, Reader] = {"where": read_names, "grid": int, "temperature": float, "noise": read_switch}
KIND: MethodSides = MethodSides(SampledModel, "with gates", convert, compare, time, run, _SETTINGS)
