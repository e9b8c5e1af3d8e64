"""One rule of a user's makes an operation work wherever a network runs: dense, adaptive, in bands, and at points.

Law: for an operation that none of ours computes, declared by `cs.operation` and `cs.rule` alone, the network as given
is the network, bands give what the whole picture gives, and points what the whole map holds, wherever it lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import covering, some
from networks import unverified
from torch import Tensor, nn

import cadsurgery as cs
from benchmarks.zoo.bands_check import MUCH, bands_of
from cadsurgery.surgery import treatment


class Contrast(nn.Module):
    """The largest value under a window less the smallest, of a map padded on all sides by zeros."""

    def __init__(self, sides: int, stride: int, padding: int) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding = sides, stride, padding
        self.ceil_mode, self.norm_type = False, 1

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (self.padding,) * 4)
        low = nn.functional.max_pool2d(-x, self.kernel_size, self.stride)
        return nn.functional.max_pool2d(x, self.kernel_size, self.stride) + low


@cs.operation(reads="window")
def lp_pool2d(x: Any, window: Any, stage: Any, power: float) -> Any:
    means = cs.functional.avg_pool2d(cs.Elements(x.rows**power, x.lattice), window, stage)
    total = means.rows * window.taps  # as torch does: a last window in part counts as a whole one
    return cs.Elements(total.sign() * total.abs() ** (1 / power), means.lattice)


@cs.operation(reads="window")
def contrast(x: Any, window: Any, stage: Any, power: float) -> Any:
    window = window._replace(outside=0.0)
    low = cs.functional.max_pool2d(cs.Elements(-x.rows, x.lattice), window, stage)
    high = cs.functional.max_pool2d(x, window, stage)
    return cs.Elements(high.rows + low.rows, high.lattice)


CALLS = {nn.LPPool2d: lp_pool2d, Contrast: contrast}


@pytest.fixture(autouse=True)
def rules() -> Iterator[None]:
    @cs.rule(*CALLS)
    def of_user(node: Any, facts: Any) -> cs.Treatment:
        """Its taps are read at their fine positions."""
        pool, pad = facts.module(node), getattr(facts.module(node), "padding", 0)
        sides, stride = (pool.kernel_size,) * 2, pool.stride or pool.kernel_size
        window = cs.Window(sides, stride, padding=(pad,) * 4, ceil_mode=pool.ceil_mode)
        arguments = (("power", pool.norm_type),)
        return cs.Treatment("window", call=CALLS[type(pool)], arguments=arguments, window=window)

    yield
    for kind in CALLS:
        del treatment._RULES[kind]


POOLS = {
    "halves": lambda: nn.LPPool2d(2, 2),
    "overlaps": lambda: nn.LPPool2d(2, 3, 2),
    "last window in part": lambda: nn.LPPool2d(2, 2, ceil_mode=True),
    "pads": lambda: Contrast(3, 2, 1),
    "moves by one": lambda: Contrast(3, 1, 1),
    "wide": lambda: Contrast(5, 2, 2),
}


PLACES = ("in the region", "in front of it", "behind it")


class Net(nn.Module):
    """Two strides with the operation between them, or beside a map of its own size at the end or the beginning."""

    def __init__(self, name: str, place: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.place, self.pool = place, POOLS[name]()
        self.one, self.two = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.last, self.grown = (
            nn.Conv2d(8, 4, 3, 1, 1),
            nn.Conv2d(4, 4, 3, 1, 2),
        )  # makes its map grow: dense

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x) if self.place == PLACES[1] else x
        x = self.one(x).relu()
        x = self.pool(x) if self.place == PLACES[0] else x
        x = self.last(self.two(x))
        if self.place == PLACES[2]:
            x = self.pool(self.grown(x))
        return x


@pytest.mark.parametrize(("name", "place", "has_floors"), covering([*POOLS], PLACES, [True, False]))
@torch.no_grad()
def test_an_operation_with_one_rule_works_dense_adaptive_and_in_bands(
    name: str, place: str, has_floors: bool
) -> None:
    options = {"coarsest": 16} if has_floors else {}
    model, image = Net(name, place).double().eval(), torch.randn(1, 3, 75, 101, dtype=torch.float64)
    net = unverified(model, "edges", example_input=torch.randn(1, 3, 64, 96).double(), **options)
    banded, whole = net.optimize(memory=MUCH), net.optimize()
    if options:
        torch.testing.assert_close(net(image, mask="all"), model(image), rtol=1e-9, atol=1e-9)
    for mask in ("edges", "all", "none"):
        for rows in (8, 32):
            with bands_of(rows):
                found = banded(image, mask=mask)
            torch.testing.assert_close(found, whole(image, mask=mask), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", some(POOLS, every=3))
@torch.no_grad()
def test_points_read_of_such_an_operation_are_those_of_the_whole_map(name: str) -> None:
    model, image = Net(name, PLACES[0]).double().eval(), torch.randn(1, 3, 75, 101, dtype=torch.float64)
    net = unverified(model, "edges", example_input=torch.randn(1, 3, 64, 96).double())
    dense, points = net(image), torch.tensor([[3.0, 5.0], [60.0, 41.0], [99.0, 70.0]])
    (found,) = cs.read_at(net, image, [points], reach="receptive")
    at = ((points + 0.5) // net.plan.strides[0]).long()
    columns, rows = (
        place.clamp(max=n - 1) for place, n in zip(at.T, (dense.shape[3], dense.shape[2]), strict=True)
    )
    torch.testing.assert_close(found, dense[0, :, rows, columns].T, rtol=1e-9, atol=1e-9)
