"""Networks that run a moved copy of the picture as well, as test-time augmentation within forward does.

What the mask keeps is as if all of the picture were kept: the mask lies on the picture as it came, so the pass over the
copy stays dense, and the plan says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, covering, images, slow, some
from networks import seeded, unverified
from torch import Tensor, nn

import cadsurgery as cs

EXACT = 1e-9
pytestmark = pytest.mark.filterwarnings("ignore:no mask can improve", "ignore:masks hardly change")
SIDE = 256
OPTIONS: dict[str, dict[str, Any]] = {"floors": {"coarsest": 32}, "finer": {"output_stride": (2, 8)}}

Run = Callable[[Tensor], Tensor]


def flipped(run: Run, x: Tensor) -> Tensor:
    return run(x.flip(3)).flip(3)


def rolled(run: Run, x: Tensor) -> Tensor:
    return torch.roll(run(x.roll(128, 3)), -128, 3)


def turned(run: Run, x: Tensor) -> Tensor:
    return torch.rot90(run(torch.rot90(x, 1, (2, 3))), -1, (2, 3))


def transposed(run: Run, x: Tensor) -> Tensor:
    return run(x.transpose(2, 3)).transpose(2, 3)


def from_the_end(run: Run, x: Tensor) -> Tensor:
    return F.pad(run(x[:, :, -128:, -192:]), (64, 0, 128, 0))


def chunked(run: Run, x: Tensor) -> Tensor:
    return torch.cat([run(part) for part in x.chunk(2, 3)], 3)


def padded(run: Run, x: Tensor) -> Tensor:
    return run(F.pad(x, (64, 0, 32, 0)))[..., 32:, 64:]


def warped(run: Run, x: Tensor) -> Tensor:
    theta = x.new_tensor([[[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]).expand(len(x), 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(run(F.grid_sample(x, grid, align_corners=False)), grid, align_corners=False)


WAYS = (flipped, rolled, turned, transposed, from_the_end, chunked, padded, slow(warped))


class Twice(nn.Module):
    """The mean of a pass over the picture and one over a moved copy; of a stem's maps where `behind` it."""

    def __init__(self, way: Callable[[Run, Tensor], Tensor], behind: bool = False) -> None:
        super().__init__()
        self.way, self.behind = way, behind
        self.stem = nn.Conv2d(3, 6, 3, 2 if behind else 1, 1)
        self.a, self.b = nn.Conv2d(6, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 2, 1)
        self.c, self.head = nn.Conv2d(6, 6, 3, 1 if behind else 2, 1), nn.Conv2d(6, 2, 1)

    def whole(self, x: Tensor) -> Tensor:
        return F.interpolate(self.head(F.relu(self.c(self.rest(self.stem(x))))), scale_factor=8.0)

    def rest(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.a(F.relu(x)))))

    def forward(self, x: Tensor) -> Tensor:
        if not self.behind:
            return (self.whole(x) + self.way(self.whole, x)) / 2
        y = F.relu(self.stem(x))
        both = self.rest(y) + F.max_pool2d(
            self.way(lambda x: F.interpolate(self.rest(x), scale_factor=4.0), y), 4
        )
        return F.interpolate(self.head(F.relu(self.c(both))), scale_factor=8.0)


def kept(where: str) -> tuple[Tensor, tuple[slice, slice]]:
    """A mask of half of the picture, and a part of that half whose values depend on nothing else."""
    levels, half = torch.zeros(2, SIDE, SIDE, dtype=torch.bool), SIDE // 2
    rows = {"top": slice(half), "bottom": slice(half, None)}.get(where, slice(None))
    columns = {"left": slice(half), "right": slice(half, None)}.get(where, slice(None))
    levels[:, rows, columns] = True
    inner = {"top": slice(0, 64), "bottom": slice(-64, None), "left": slice(0, 64), "right": slice(-64, None)}
    part = slice(None), inner[where]
    return levels, part if where in ("left", "right") else part[::-1]


@pytest.mark.parametrize(
    ("way", "options", "where"), covering(some(WAYS), OPTIONS, ["left", "right", "top", "bottom"])
)
@torch.no_grad()
def test_what_is_kept_is_as_if_all_were_kept(
    way: Callable[[Run, Tensor], Tensor], options: str, where: str
) -> None:
    model, x = seeded(lambda: Twice(way)).eval(), images(2, SIDE, SIDE, torch.float64)
    net = unverified(model, "content", example_input=x[:1], **OPTIONS[options])
    levels, part = kept(where)
    if options == "finer":
        levels = levels[:, ::2, ::2]
    found, all_kept = net(x, mask=levels), net(x, mask="all")
    assert_same(found[..., *part], all_kept[..., *part], EXACT)
    own = all_kept if options == "floors" else net(x, mask="none")
    assert_same(own, model(x), EXACT)
    if way is not chunked:  # of which the first part lies where the mask does
        assert "copy of the picture" in net.plan.summary()
    assert any(decision.action == "adapt" for decision in net.plan.decisions)


class Cropped(Twice):
    """Whatever the network reads is cropped: the crop is the picture."""

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x[..., 32:, 32:])


@torch.no_grad()
def test_a_picture_that_is_only_cropped_is_no_copy() -> None:
    model, x = seeded(lambda: Cropped(flipped)).eval(), images(1, 128, 160, torch.float64)
    net = cs.adaptify(model, "content", example_input=x, coarsest=32)
    assert "copy of the picture" not in net.plan.summary()
    assert_same(net(x, mask="all"), model(x), EXACT)
