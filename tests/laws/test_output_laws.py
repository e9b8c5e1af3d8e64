"""Law 1 as a user sees it: the outputs of the call, at the network's own level, are the original's.

Resizes that leave the region are those of the emulation, whatever the level map.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch.nn.functional as F
from conftest import assert_same, covering, images, some
from networks import conv_norm, randomise
from random_laws import compare
from random_networks import Case, Draw
from torch import Tensor, nn

import cadsurgery as cs

EXACT = 1e-9
SIZES = [(64, 96), (75, 101), (97, 130)]


block = partial(conv_norm, bias=False, inplace=True)


class Encoder(nn.Module):
    """Five strides, 1x1 scores: what a subclass does with them is the point."""

    def __init__(self) -> None:
        super().__init__()
        widths = (4, 4, 6, 8, 16)
        strided = [block(before, after, 2) for before, after in zip((3, *widths), widths, strict=False)]
        self.body = nn.Sequential(*strided[:3], block(6, 6), *strided[3:], block(16, 16))
        self.head = nn.Conv2d(16, 3, 1)

    def scores(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Resized(Encoder):
    def __init__(self, how: dict[str, Any], by: str) -> None:
        super().__init__()
        self.how, self.by = how, by

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        if self.by == "size":
            return F.interpolate(scores, x.shape[2:], **self.how)
        if self.by == "recomputed":
            return F.interpolate(scores, scale_factor=31.5, recompute_scale_factor=True, **self.how)
        return F.interpolate(scores, scale_factor=float(self.by), **self.how)


# Ways to resize that random networks do not draw: modes of `torch.nn.functional.interpolate`, and by what.
RESIZED: dict[str, tuple[dict[str, Any], str]] = {
    "nearest-exact to a size": ({"mode": "nearest-exact"}, "size"),
    "nearest-exact by a factor": ({"mode": "nearest-exact"}, "12.7"),
    "nearest by a recomputed factor": ({"mode": "nearest"}, "recomputed"),
    "bilinear by a factor": ({"mode": "bilinear", "align_corners": False}, "12.7"),
    "aligned by a recomputed factor": ({"mode": "bilinear", "align_corners": True}, "recomputed"),
}


def settled(model: nn.Module) -> nn.Module:
    randomise(model)
    return model.double().eval()


@pytest.mark.parametrize(("name", "seed"), covering(some(RESIZED), range(3)))
def test_a_network_that_resizes_is_its_emulation(name: str, seed: int) -> None:
    """On a random level map, image by image, optimised; and on the network's own grid the network."""
    model, size = settled(Resized(*RESIZED[name])), SIZES[seed]
    compare(Case(model, images(2, *size).double(), images(1, 64, 96).double(), True), Draw(seed))


class Features(Encoder):
    def forward(self, x: Tensor) -> list[Tensor]:
        middle = self.body[3](self.body[2](self.body[1](self.body[0](x))))
        lower = self.body[4](middle)
        return [middle, lower, self.body[6](self.body[5](lower))]


def test_maps_are_returned_at_the_fine_size_or_as_the_network_returns_them() -> None:
    model = settled(Features())
    x = images(2, 67, 99).double()
    expected = model(x)
    for outputs in ("fine", "native"):
        net = cs.adaptify(model, "none", output_stride=(8, 32), outputs=outputs)  # type: ignore[arg-type]
        found = net(x)
        assert net.plan.returned == outputs
        for ours, theirs, own in zip(found, expected, (8, 16, 32), strict=True):
            step = own // 8 if outputs == "fine" else 1
            assert_same(ours[..., ::step, ::step], theirs, EXACT)
        shapes = {tuple(value.shape[2:]) for value in found}
        assert len(shapes) == (1 if outputs == "fine" else 3)
        said = "(output stride 32): returned at output stride 8" in net.plan.summary()
        assert said == (outputs == "fine")


def test_another_word_for_the_outputs_is_refused() -> None:
    with pytest.raises(cs.InvalidInput, match="fine, native"):
        cs.plan(settled(Features()), outputs="coarse")  # type: ignore[arg-type]


class TwoStrides(nn.Module):
    """Returns maps of output strides 8 and 16, both from within the region."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(block(3, 4, 2), block(4, 4, 2), nn.Conv2d(4, 4, 3, 2, 1))
        self.second = nn.Sequential(block(4, 64, 2), nn.Conv2d(64, 64, 3, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first(x)
        return first, self.second(first)


def test_the_finest_stride_that_matters_is_that_of_the_finest_map_that_leaves() -> None:
    plan = cs.plan(settled(TwoStrides()), (2, 16), outputs="native")
    assert [stride for _, stride in plan.outputs] == [8, 16] and plan.finest == 8
    assert "output_stride=(8, 16) does without" in plan.summary()
