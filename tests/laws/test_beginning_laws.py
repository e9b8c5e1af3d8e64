"""Networks that begin with what has no lattice or rearranges the picture: the rest gets floors all the same.

`adaptify` verifies the laws on its example: everything high is the network as given, every floor, alone and side by
side, is its emulation in dense operations. These tests add other sizes, batches and types, and what plans say.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import covering, some
from torch import Tensor, nn

import cadsurgery as cs

SIZES = [(64, 96), (66, 38), (52, 70)]


class Body(nn.Module):
    """Two scales that are joined, and a head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fine, self.down = nn.Conv2d(channels, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.join, self.head = nn.Conv2d(16, 8, 3, 1, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x).relu()
        up = F.interpolate(self.down(fine).relu(), fine.shape[2:], mode="bilinear")
        return self.head(self.join(torch.cat([fine, up], 1)).relu())


class SpaceToDepth(nn.Module):
    """Every second pixel, four times, in channels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body(12)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return self.body(torch.cat(parts, 1))


class Shortcut(nn.Module):
    """Shortcuts that take every second sample, as in residual networks without projections; any size fits."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = self.b(x).relu() + x[:, :, ::2, ::2]
        return self.c(x).relu() + x[:, :, ::2, ::2]


class FarApart(nn.Module):
    """Every fourth sample from the third row and the fifth column on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.body = nn.Conv2d(3, 8, 3, 1, 1), Body(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.a(x).relu()[:, :, 2::4, 4::4])


SLICED = [SpaceToDepth, Shortcut, FarApart]


def made(kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval().to(dtype)


@pytest.mark.parametrize("kind", some(SLICED))
def test_slices_with_steps_are_adaptive_stages(kind: type[nn.Module]) -> None:
    """With a lattice finer than the network's own grid they are computed at every sample, as strides are."""
    model, image = made(kind, torch.float64), torch.randn(2, 3, 64, 96, dtype=torch.float64)
    low = cs.plan(model).output_stride[1]
    net = cs.adaptify(model, "edges", output_stride=(1, low), outputs="native").eval()
    assert all(check.passed for check in net.checks)
    sliced = [one for one in net.plan.decisions if one.operation.startswith("getitem 1x1")]
    assert sliced and all(one.action == "adapt" for one in sliced)
    torch.testing.assert_close(net(image, mask="none"), model(image))


class Rectangular(nn.Module):
    """Strides along one axis after the other, in front."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.body = nn.Conv2d(3, 8, 3, (2, 1), 1), nn.Conv2d(8, 8, 3, (1, 2), 1), Body(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.b(self.a(x)).relu())


class Mixing(nn.Module):
    """Sums along columns behind a convolution: each position reads all above it."""

    stride = 1

    def __init__(self) -> None:
        super().__init__()
        self.a, self.body = nn.Conv2d(3, 8, 3, self.stride, 1), Body(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(torch.cumsum(self.a(x).relu(), 2) / 10)


class SkipAround(Rectangular):
    """The picture itself, finer than the map behind the beginning, is joined at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(6, 2, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        up = F.interpolate(super().forward(x), x.shape[2:], mode="bilinear")
        return self.last(torch.cat([x, up], 1))


BEGINNINGS = {Rectangular: 2, Mixing: 1, SkipAround: 2}
KINDS = [kind for pair in zip(SLICED, BEGINNINGS, strict=True) for kind in pair]  # some of both


@pytest.mark.parametrize(
    ("kind", "dtype", "batch", "size"),
    covering(some(KINDS, every=3), [torch.float32, torch.float64], [1, 3], [*SIZES, (65, 47), (36, 53)]),
)
def test_floors_begin_behind_a_dense_beginning_and_slices_with_steps_are_strides(
    kind: type[nn.Module], dtype: torch.dtype, batch: int, size: tuple[int, int]
) -> None:
    """Everything high is the network at an image of another size and batch, and a copy is the same."""
    if kind is SpaceToDepth and any(side % 2 for side in size):  # which takes even sizes alone
        size = (66, 38)
    model, image = made(kind, dtype), torch.randn(batch, 3, *size, dtype=dtype)
    example = torch.randn(2, 3, 64, 96, dtype=dtype)
    net = cs.adaptify(model, "edges", coarsest=16, example_input=example).eval()
    assert all(check.passed for check in net.checks)
    torch.testing.assert_close(net(image, mask="all"), model(image))
    torch.testing.assert_close(net.optimize()(image), net(image), rtol=1e-4, atol=1e-5)
    if kind in SLICED:
        assert net.plan.share("adapt", "keep") == 1
        return
    assert net.plan.output_stride == (BEGINNINGS[kind], 16) and net.plan.share("adapt", "keep") > 0.5
    low, own = (net.macs(image, mask=mask).mask for mask in ("none", "all"))
    assert low < 0.6 * own
