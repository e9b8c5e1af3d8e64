"""How backbones are written and wrapped: features by index, name or hook, checkpoints, own activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as cp
from corpus_blocks import Encoder, Residual, conv
from torch import nn

from benchmarks.zoo.corpus import network


class Saved:
    """Keeps what a module gave (as fastai's hooks)."""

    def __init__(self, module: nn.Module) -> None:
        self.features = None
        module.register_forward_hook(self.keep)

    def keep(self, module, inputs, output):
        self.features = output


@network("wrapped", "transposed")
class HookedFeatures(nn.Module):
    """Skips are collected by forward hooks of the encoder's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv(3, 8, 3, 2), Residual(8, 16, 2), Residual(16, 32, 2))
        self.saved = [Saved(self.encoder[0]), Saved(self.encoder[1])]
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x):
        y = F.relu(self.encoder(x))
        y = F.relu(self.up2(y)[:, :, : self.saved[1].features.size(2), : self.saved[1].features.size(3)])
        y = y + self.saved[1].features
        first = self.saved[0].features
        return self.out(first + self.up1(y)[:, :, : first.size(2), : first.size(3)])


@network("wrapped", "decisions")
class Checkpointed(nn.Module):
    """Blocks are recomputed in the backward pass while training, `if y.requires_grad`."""

    def __init__(self, with_cp: bool = True) -> None:
        super().__init__()
        self.with_cp, self.stem = with_cp, conv(3, 8, 3, 2)
        self.blocks = nn.ModuleList(
            [Residual(8, 16, 2), Residual(16, 16), Residual(16, 32, 2), Residual(32, 32)]
        )
        self.head = nn.Conv2d(32, 3, 1)

    def forward(self, x):
        y = self.stem(x)
        for block in self.blocks:
            if self.with_cp and y.requires_grad and self.training:
                y = cp.checkpoint(block, y, use_reentrant=False)
            else:
                y = block(y)
        return F.interpolate(self.head(y), size=x.shape[2:], mode="nearest")


@torch.jit.script
def mish(x):
    """Compiled by TorchScript."""
    return x * torch.tanh(F.softplus(x))


@network("wrapped")
class ScriptedActivation(nn.Module):
    """An activation that TorchScript compiled; context managers in `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.conv3, self.out = nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(32, 3, 1)

    def forward(self, x):
        with torch.no_grad():
            x = (x - 0.5) / 0.25
        y = mish(self.conv2(mish(self.conv1(x))))
        with torch.autocast("cpu", enabled=False):
            y = mish(self.conv3(y))
        return F.interpolate(self.out(y), size=x.shape[2:], mode="bilinear")


@network("wrapped")
def in_data_parallel() -> nn.Module:
    """Wrapped in `nn.DataParallel`, as checkpoints of many repositories are."""
    net = nn.Sequential(conv(3, 8, 3, 2), Residual(8, 16, 2), Residual(16, 32, 2), nn.Conv2d(32, 4, 1))
    return nn.DataParallel(net, device_ids=[])


@network("bins", "pads", "sizes")
class RatioPyramid(nn.Module):
    """Pooling to grids whose shape follows the image's (as SwiftNet), bins counted from the size."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.bottleneck = Encoder(), conv(64, 32, 1)
        self.grids = nn.ModuleList([conv(32, 8, 1) for _ in range(3)])
        self.fuse, self.up = conv(56, 32, 1), nn.ModuleList([conv(32, 32), conv(32, 32)])
        self.lateral = nn.ModuleList([nn.Conv2d(32, 32, 1), nn.Conv2d(16, 32, 1)])
        self.out = nn.Conv2d(32, 3, 1)

    def forward(self, x):
        c1, c2, c3, c4 = self.encoder(x)
        y = self.bottleneck(c4)
        h, w = y.shape[2:]
        levels = [y]
        for grid, step in zip((4, 2, 1), self.grids):
            bins = (grid, max(1, round(w / h * grid)))
            levels.append(F.interpolate(step(F.adaptive_avg_pool2d(y, bins)), (h, w), mode="bilinear"))
        y = self.fuse(torch.cat(levels, 1))
        for up, lateral, skip in zip(self.up, self.lateral, (c3, c2)):
            y = up(F.interpolate(y, skip.shape[2:], mode="bilinear") + lateral(skip))
        return F.interpolate(self.out(y), x.shape[2:], mode="bilinear")


class LambdaLayer(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class WithoutWeights(nn.Module):
    """A residual block whose shortcut has no weights: every second pixel, channels of zeros around."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(inputs, outputs, 3, stride), nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut = nn.Sequential()
        if stride != 1:
            more = (outputs - inputs) // 2
            self.shortcut = LambdaLayer(
                lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, more, more), "constant", 0)
            )

    def forward(self, x):
        return F.relu(self.conv2(self.conv1(x)) + self.shortcut(x))


@network("shapes", "modules", "pads")
class SlicedShortcuts(nn.Module):
    """Shortcuts by strided slices and channels padded with zeros (as a ResNet for small images)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        blocks = [
            WithoutWeights(8, 16, 2),
            WithoutWeights(16, 16, 1),
            WithoutWeights(16, 32, 2),
            WithoutWeights(32, 32, 1),
        ]
        self.layers, self.out = nn.Sequential(*blocks), nn.Conv2d(32, 3, 1)

    def forward(self, x):
        y = self.out(self.layers(self.stem(x)))
        return F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)
