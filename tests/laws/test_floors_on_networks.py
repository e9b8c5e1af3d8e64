"""Floors on the kinds of networks that have no fine output stride of their own: decoders, pyramids, poses, pictures.

Their conversion itself compares every floor, and floors side by side, with a dense emulation (`net.checks`).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import cadsurgery as cs
from benchmarks.zoo.corpus import CHECKOUT, subject

# By what they show: unpooling, transposed convolutions, sums and concatenations with an encoder, an image padded by
# 100 pixels, poses, several scales.
SIZES = {
    "realtime:SegNet": (64, 96),
    "realtime:LinkNet": (96, 128),
    "scenes:FCN8s": (64, 96),
    "heads:PoseBaseline": (96, 128),
    "scenes:FeaturePyramid": (96, 128),
    "unets:unet_transposed": (96, 128),
    "pictures:ShuffledRestoration": (96, 128),
}
QUICK = {"heads:PoseBaseline"}


def maps(output: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SIZES]
)
@torch.no_grad()
def test_networks_on_their_own_grid_save_work_where_nothing_is(name: str) -> None:
    torch.manual_seed(0)
    model, image = subject(name, CHECKOUT).build().eval(), torch.rand(2, 3, *SIZES[name])
    net = cs.adaptify(model, "none", coarsest=32, example_input=image)
    compared = [check for check in net.checks if "is its emulation" in check.law]
    assert compared and all(check.passed for check in compared)
    for own, given in zip(maps(net(image, mask="all")), maps(model(image)), strict=True):
        assert torch.equal(own, given)
    assert net.macs(image[:1]).of_given < 0.7
    kept = torch.zeros_like(net.levels, dtype=torch.bool)
    kept[:, 32:64, 32:64] = True
    for fast, plain in zip(maps(net.optimize()(image, mask=kept)), maps(net(image, mask=kept)), strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4)
