"""Heads of the kinds people write behind a dilated encoder: each is a network of a few channels.

Rates that are no multiples of the cells, sums of branches, norms apart from convolutions, means, shuffles, unpooling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from networks import Composed, conv_norm, randomise, strided
from torch import Tensor, nn

C = 8


def unit(channels: int = C, outputs: int = C, size: int = 3, rate: int = 1, groups: int = 1) -> nn.Sequential:
    return conv_norm(channels, outputs, 1, rate, size, groups, bias=False)


def as_large(y: Tensor, x: Tensor) -> Tensor:
    return F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)


def branches(*maps: nn.Module, is_sum: bool = False) -> nn.Module:
    """Branches of one map, joined or added."""

    def forward(net: Any, x: Tensor) -> Tensor:
        first, *others = (one(x) for one in net.maps)
        return net.last(sum(others, first) if is_sum else torch.cat([first, *others], 1))

    return Composed(forward, maps=nn.ModuleList(maps), last=nn.Conv2d(C * (1 if is_sum else len(maps)), C, 1))


def pooled() -> nn.Module:
    """The mean over the image, resized to the map."""
    layers = nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, C, 1), nn.ReLU()
    return Composed(lambda net, x: as_large(net.layers(x), x), layers=nn.Sequential(*layers))


def dense_unit(channels: int) -> nn.Module:
    """Pre-activation on all that was computed so far."""
    norm, conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, C, 3, padding=1)
    return Composed(lambda net, x: torch.cat([x, net.conv(F.relu(net.norm(x)))], 1), norm=norm, conv=conv)


def unpooled(net: Any, x: Tensor) -> Tensor:
    """As ENet: pooling with places, unpooled onto the map in front."""
    y, places = net.pool(x)
    return net.unpool(net.conv(y), places, output_size=x.shape) + x


def gate() -> nn.Module:
    layers = nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, C, 1), nn.Sigmoid()
    return Composed(lambda net, x: x * net.layers(x), layers=nn.Sequential(*layers))


def aspp(*rates: int) -> nn.Module:
    return branches(unit(size=1), *(unit(rate=rate) for rate in rates), pooled())


HEADS: dict[str, Callable[[], nn.Module]] = {
    "rates of whole cells": lambda: aspp(4, 8),
    "rates that are no multiples": lambda: nn.Sequential(aspp(3, 6, 9), unit()),
    "a sum of branches": lambda: branches(unit(), unit(rate=2), unit(rate=3), is_sum=True),
    "a norm in front": lambda: nn.Sequential(
        nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 3, padding=4, dilation=4)
    ),
    "a norm behind a join": lambda: nn.Sequential(
        branches(unit(size=1), unit(rate=4)), nn.BatchNorm2d(C), nn.PReLU(C)
    ),
    "a norm on a dense map": lambda: nn.Sequential(unit(rate=3), nn.BatchNorm2d(C), nn.LeakyReLU(0.1)),
    "dense units": lambda: nn.Sequential(dense_unit(C), dense_unit(2 * C), nn.Conv2d(3 * C, C, 1)),
    "asymmetric": lambda: nn.Sequential(
        nn.Conv2d(C, C, (3, 1), padding=(4, 0), dilation=(4, 1)), nn.BatchNorm2d(C)
    ),
    "depthwise": lambda: nn.Sequential(unit(rate=4, groups=C), unit(size=1)),
    "groups": lambda: nn.Sequential(unit(groups=2), unit(rate=4, groups=4)),
    "channels shuffled": lambda: nn.Sequential(unit(groups=2), nn.ChannelShuffle(2), unit(size=1)),
    "gate": lambda: nn.Sequential(unit(), gate(), unit(size=1)),
    "pixels shuffled": lambda: nn.Sequential(nn.Conv2d(C, 4 * C, 3, padding=1), nn.PixelShuffle(2), unit()),
    "unpooled": lambda: Composed(
        unpooled, pool=nn.MaxPool2d(2, return_indices=True), unpool=nn.MaxUnpool2d(2), conv=unit()
    ),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(C, C, 2, 2), nn.BatchNorm2d(C), nn.ReLU(), unit()),
    "local response": lambda: nn.Sequential(unit(), nn.LocalResponseNorm(3), unit(size=1)),
    "halves": lambda: nn.Sequential(unit(), nn.GLU(1), unit(C // 2)),
    "softmax": lambda: nn.Sequential(unit(), nn.Softmax2d()),
    "chosen values": lambda: nn.Sequential(
        unit(), Composed(lambda _, x: x.masked_fill(x > 0.3, 0.0)), unit(size=1)
    ),
    "written channels": lambda: nn.Sequential(unit(), Composed(half_written), unit(size=1)),
    "a mean": lambda: nn.Sequential(unit(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, C)),
    "bins": lambda: bins(),
    "resized twice": lambda: nn.Sequential(
        nn.Upsample(scale_factor=2, mode="bilinear"), unit(), nn.Upsample(scale_factor=2)
    ),
}


def half_written(_: Any, x: Tensor) -> Tensor:
    y = x * 1.0
    y[:, : C // 2] = x[:, C // 2 :]
    return y


def bins() -> nn.Module:
    return Composed(
        lambda net, x: net.last(torch.cat([x, as_large(F.adaptive_avg_pool2d(x, 2), x)], 1)),
        last=nn.Conv2d(2 * C, C, 1),
    )


def network(head: str) -> nn.Module:
    """An encoder of output stride 4 whose last stages dilate, and a head."""
    torch.manual_seed(0)
    dilated = [*unit(rate=1), *unit(rate=2), *unit(rate=2), *unit(rate=4), *unit(rate=4)]
    return randomise(nn.Sequential(*strided(2, C), *dilated, HEADS[head]()))
