"""Networks whose Python code decides by the size of a map, as ports of TensorFlow's "same" padding do.

At every size, at their own level, the converted network gives what they give, wherever it was converted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
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


# -- how much it pads, as it is written ----------------------------------------------------------------


def by_rest(length: int, kernel: int, stride: int) -> int:
    if length % stride == 0:
        return max(kernel - stride, 0)
    return max(kernel - length % stride, 0)


def by_outputs(length: int, kernel: int, stride: int) -> int:
    return max((math.ceil(length / stride) - 1) * stride + kernel - length, 0)


class Same(nn.Module):
    """A convolution with "same" padding; `asks` whether there is anything to pad."""

    def __init__(
        self, channels: int, stride: int, needed: Callable[..., int], asks: bool, kernel: int
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, kernel, stride)
        self.needed, self.asks = needed, asks

    def forward(self, x: Tensor) -> Tensor:
        high, wide = (
            self.needed(length, kernel, stride)
            for length, kernel, stride in zip(
                x.shape[-2:], self.conv.kernel_size, self.conv.stride, strict=True
            )
        )
        if not self.asks or high > 0 or wide > 0:
            x = F.pad(x, [wide // 2, wide - wide // 2, high // 2, high - high // 2])
        return F.relu(self.conv(x))


class Padded(nn.Module):
    """Output stride 16."""

    def __init__(self, needed: Callable[..., int], asks: bool, kernel: int) -> None:
        super().__init__()
        strides = (2, 1, 2, 1, 2, 2)
        self.body = nn.Sequential(
            *(Same(3 if i == 0 else 6, stride, needed, asks, kernel) for i, stride in enumerate(strides))
        )
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


SPELLINGS: dict[str, Callable[..., int]] = {
    "by rest": by_rest,
    "by outputs": by_outputs,
}
EXAMPLES = ((64, 96), (67, 101))
SIZES = ((64, 96), (67, 101), (70, 102), (65, 96))
OPTIONS: dict[str, dict[str, Any]] = {
    "finer": {"output_stride": (4, 16), "outputs": "native"},
    "floors": {"coarsest": 32},
}


def own_level(net: cs.AdaptiveModel) -> str:
    return "all" if net.plan.floors else "none"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spelling", "asks", "kernel", "options", "example"),
    covering(some(SPELLINGS), [False, True], [3, 5], OPTIONS, EXAMPLES),
)
@torch.no_grad()
def test_same_padding_is_followed_at_every_size(
    spelling: str, asks: bool, kernel: int, options: str, example: tuple[int, int]
) -> None:
    model = seeded(partial(Padded, SPELLINGS[spelling], asks, kernel)).eval()
    net = unverified(model, example_input=images(1, *example, torch.float64), **OPTIONS[options])
    for size in SIZES:
        x = images(2, *size, torch.float64)
        assert_same(net(x, mask=own_level(net)), model(x), EXACT)


class Scored(nn.Module):
    """Points in pixels and scores in 0..1 in one tensor; it pads above and on the left of maps of odd size."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 2)
        self.three, self.four = nn.Conv2d(6, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 2, 1)
        self.score = nn.Conv2d(6, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        above, before = (0 if length % 2 == 0 else 1 for length in x.shape[2:])
        x = F.pad(x, (before, 1, above, 1))
        x = F.relu(self.four(F.relu(self.three(F.relu(self.two(x))))))
        score = self.score(x).sigmoid()
        b, _, h, w = score.shape
        ys, xs = (torch.arange(n, device=score.device).to(score) for n in (h, w))
        points = torch.stack((xs.expand(h, w), ys.view(h, 1).expand(h, w))).expand(b, 2, h, w)
        return torch.cat([16.0 * points, score], 1)


@pytest.mark.slow
@torch.no_grad()
def test_large_values_beside_small_ones_hide_no_decision() -> None:
    """Nor do they in the check of the conversion: the scores are right at the scale of the scores."""
    model = seeded(Scored).eval()
    net = cs.adaptify(model, example_input=images(1, *EXAMPLES[0], torch.float64), **OPTIONS["finer"])
    for size in SIZES:
        x = images(2, *size, torch.float64)
        assert_same(net(x, mask="none")[:, 2], model(x)[:, 2], EXACT)


@torch.no_grad()
def test_a_graph_of_the_example_serves_the_example() -> None:
    """Whatever other size it was traced on: a call like the example is never read anew."""
    model = seeded(partial(Padded, by_rest, False, 3)).eval()
    x = images(1, *EXAMPLES[1], torch.float64)
    net = cs.adaptify(model, example_input=x, coarsest=32, verify_laws=False)
    net(x)
    assert not net._paths
    assert net.plan.example_shape == x.shape


class Patches(nn.Module):
    """A patch embedding that pads what does not divide into patches, as Swin and FocalNet write it; then two windows
    of stride 2, with or without padding, and a mean over the image, of which the head takes little."""

    def __init__(self, patch: int, pads: bool, asks: bool) -> None:
        super().__init__()
        self.patch, self.asks, sides = patch, asks, (3, 1) if pads else (2, 0)
        self.embed = nn.Conv2d(3, 6, patch, patch)
        self.two, self.three = (nn.Conv2d(6, 6, sides[0], 2, sides[1]) for _ in range(2))
        self.head = nn.Linear(6, 3)
        self.head.weight.data *= 0.01

    def forward(self, x: Tensor) -> Tensor:
        (high, wide), patch = x.shape[2:], self.patch
        if not self.asks or wide % patch != 0:
            x = F.pad(x, (0, patch - wide % patch))
        if not self.asks or high % patch != 0:
            x = F.pad(x, (0, 0, 0, patch - high % patch))
        x = F.gelu(self.three(F.gelu(self.two(F.gelu(self.embed(x))))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("patch", "pads", "asks", "options", "example"),
    covering([2, slow(4), 7], [False, True], [True, False], OPTIONS, [(128, 192), (97, 129)]),
)
@torch.no_grad()
def test_a_patch_that_later_strides_drop_at_some_sizes_is_not_forgotten(
    patch: int, pads: bool, asks: bool, options: str, example: tuple[int, int]
) -> None:
    """One row of patches more changes nothing where a stride of 2 drops it, and something at other sizes."""
    model = seeded(partial(Patches, patch, pads, asks)).eval()
    given = {"output_stride": (patch, 4 * patch)} if options == "finer" else OPTIONS[options]
    if options == "floors" and patch == 7:  # cells of floors are multiples of the strides
        given = {"coarsest": 28}
    net = unverified(model, example_input=images(1, *example, torch.float64), **given)
    for size in ((128, 192), (131, 197), (119, 125)):
        x = images(2, *size, torch.float64)
        assert_same(net(x, mask=own_level(net)) - model.head.bias, model(x) - model.head.bias, EXACT)
