"""Heads of the kinds people write behind a dilated encoder: each is a network of a few channels.

Rates that are no multiples of the cells, sums of branches, norms apart from convolutions, means, shuffles, unpooling.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

C = 8


def unit(channels: int = C, outputs: int = C, size: int = 3, rate: int = 1, groups: int = 1) -> nn.Sequential:
    pad = rate * (size // 2)
    conv = nn.Conv2d(channels, outputs, size, padding=pad, dilation=rate, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Branches(nn.Module):
    """Branches of one map, joined."""

    def __init__(self, *branches: nn.Module, join: str = "cat") -> None:
        super().__init__()
        self.branches, self.join = nn.ModuleList(branches), join
        self.last = nn.Conv2d(C * (len(branches) if join == "cat" else 1), C, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [branch(x) for branch in self.branches]
        result: Tensor = self.last(torch.cat(maps, 1) if self.join == "cat" else sum(maps[1:], maps[0]))
        return result


class Pooled(nn.Module):
    """The mean over the image, resized to the map."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, C, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.layers(x), size=x.shape[2:], mode="bilinear", align_corners=False)


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class DenseUnit(nn.Module):
    """Pre-activation on all that was computed so far."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, C, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class Bottleneck(nn.Module):
    """As ENet: pooling with places, unpooled onto the map in front."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.conv = unit()

    def forward(self, x: Tensor) -> Tensor:
        y, places = self.pool(x)
        result: Tensor = self.unpool(self.conv(y), places, output_size=x.shape) + x
        return result


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, C, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x * self.layers(x)
        return result


def aspp(*rates: int) -> nn.Module:
    return Branches(unit(size=1), *(unit(rate=rate) for rate in rates), Pooled())


HEADS: dict[str, Callable[[], nn.Module]] = {
    "rates of whole cells": lambda: aspp(4, 8),
    "rates that are no multiples": lambda: nn.Sequential(aspp(3, 6, 9), unit()),
    "a sum of branches": lambda: Branches(unit(), unit(rate=2), unit(rate=3), join="sum"),
    "a norm in front": lambda: nn.Sequential(
        nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 3, padding=4, dilation=4)
    ),
    "a norm behind a join": lambda: nn.Sequential(
        Branches(unit(size=1), unit(rate=4)), nn.BatchNorm2d(C), nn.PReLU(C)
    ),
    "a norm on a dense map": lambda: nn.Sequential(unit(rate=3), nn.BatchNorm2d(C), nn.LeakyReLU(0.1)),
    "dense units": lambda: nn.Sequential(DenseUnit(C), DenseUnit(2 * C), nn.Conv2d(3 * C, C, 1)),
    "asymmetric": lambda: nn.Sequential(
        nn.Conv2d(C, C, (3, 1), padding=(4, 0), dilation=(4, 1)), nn.BatchNorm2d(C)
    ),
    "depthwise": lambda: nn.Sequential(unit(rate=4, groups=C), unit(size=1)),
    "groups": lambda: nn.Sequential(unit(groups=2), unit(rate=4, groups=4)),
    "channels shuffled": lambda: nn.Sequential(unit(groups=2), nn.ChannelShuffle(2), unit(size=1)),
    "gate": lambda: nn.Sequential(unit(), Gate(), unit(size=1)),
    "pixels shuffled": lambda: nn.Sequential(nn.Conv2d(C, 4 * C, 3, padding=1), nn.PixelShuffle(2), unit()),
    "unpooled": Bottleneck,
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(C, C, 2, 2), nn.BatchNorm2d(C), nn.ReLU(), unit()),
    "local response": lambda: nn.Sequential(unit(), nn.LocalResponseNorm(3), unit(size=1)),
    "halves": lambda: nn.Sequential(unit(), nn.GLU(1), unit(C // 2)),
    "softmax": lambda: nn.Sequential(unit(), nn.Softmax2d()),
    "chosen values": lambda: nn.Sequential(
        unit(), Apply(lambda x: x.masked_fill(x > 0.3, 0.0)), unit(size=1)
    ),
    "written channels": lambda: nn.Sequential(unit(), Apply(half_written), unit(size=1)),
    "a mean": lambda: nn.Sequential(unit(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, C)),
    "bins": lambda: Bins(),
    "resized twice": lambda: nn.Sequential(
        nn.Upsample(scale_factor=2, mode="bilinear"), unit(), nn.Upsample(scale_factor=2)
    ),
}


def half_written(x: Tensor) -> Tensor:
    y = x * 1.0
    y[:, : C // 2] = x[:, C // 2 :]
    return y


class Bins(nn.Module):
    """Means of four bins, resized to the map."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(2 * C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        bins = F.adaptive_avg_pool2d(x, 2)
        y = F.interpolate(bins, size=x.shape[2:], mode="bilinear", align_corners=False)
        result: Tensor = self.last(torch.cat([x, y], 1))
        return result


def network(head: str) -> nn.Module:
    """An encoder of output stride 4 whose last stages dilate, and a head."""
    torch.manual_seed(0)
    strided = [nn.Conv2d(3, C, 3, 2, 1), nn.ReLU(), nn.Conv2d(C, C, 3, 2, 1), nn.ReLU()]
    dilated = [*unit(rate=1), *unit(rate=2), *unit(rate=2), *unit(rate=4), *unit(rate=4)]
    model = nn.Sequential(*strided, *dilated, HEADS[head]())
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean, norm.running_var = (
            0.2 * torch.randn(norm.num_features),
            torch.rand(norm.num_features) + 0.5,
        )
        nn.init.normal_(norm.weight, 1, 0.2)
    return model.eval()
