"""The first backend of the table that takes a work serves: the same bits where instruction sets are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cadsurgery.elements.backends import choose
from cadsurgery.elements.backends.choose import Backend
from cadsurgery.elements.backends.native import Native
from cadsurgery.elements.backends.reference import Torch
from cadsurgery.elements.backends.weights import Activation, FusedConv
from cadsurgery.elements.backends.works import Convolution, Mixing, Picking, WindowRead
from cadsurgery.elements.kernel_map import Reading, Window
from cadsurgery.elements.lattice import Geometry


class Named(Backend):
    """The reference under another name, for works with some taps."""

    def __init__(self, name: str, taps: int) -> None:
        self.name, self.taps = name, taps

    def applies(self, work: Any) -> bool:
        return bool(work.weights.weight[0, 0].numel() == self.taps)

    def convolve(self, work: Convolution) -> Tensor:
        return Torch().convolve(work)


def work(channels: int = 20, groups: int = 1, taps: int = 3, levels: int = 2) -> Convolution:
    """A convolution on a lattice of two levels, or of one, with packed weights."""
    blocks = (torch.arange(32).view(1, 4, 8) % levels).repeat_interleave(2, 1).repeat_interleave(2, 2)
    lattice = Geometry((2,)).lattice(blocks).at(1)
    pad = taps // 2
    window = Window((taps, taps), 1, (1, 1), (pad, pad, pad, pad), spacing=2)
    weight = torch.randn(channels, channels // groups, taps, taps)
    weights = FusedConv(weight, torch.randn(channels), groups, Activation("relu"), {})
    return Convolution(torch.randn(lattice.count, channels), weights, WindowRead(lattice, lattice, window))


@torch.no_grad()
@pytest.mark.smoke
def test_the_first_that_applies_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "BACKENDS", [Named("one", 9), Named("two", 9), Named("three", 25), Torch()])
    names = [choose.choose(work(taps=taps)).backend.name for taps in (3, 5, 7)]
    assert names == ["one", "three", "torch"]


@torch.no_grad()
def test_rows_are_mixed_alike_wherever_they_are_read() -> None:
    """Interpolated into a halo or read one by one: another backend for one of both would round them differently."""
    rows = torch.randn(40, 20).bfloat16()
    sources, shares = torch.randint(0, 40, (30, 4), dtype=torch.int32), torch.rand(30, 4)
    places = 41 + torch.arange(30, dtype=torch.int32).view(-1, 1, 1)
    mixed = choose.compute(Mixing(rows, sources, shares))
    picked = choose.compute(Picking(rows, Reading(places, sources, shares, False)))
    assert torch.equal(mixed, picked)


@torch.no_grad()
def test_kernels_serve_grouped_convolutions_of_uniform_maps_that_are_dilated() -> None:
    """Dense ones take up to eight times as long."""
    far = work(groups=20, taps=5, levels=1)
    if not Native().applies(far):
        pytest.skip("needs compiled kernels")
    assert choose.choose(far).backend.name == "native"
