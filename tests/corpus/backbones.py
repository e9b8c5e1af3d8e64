"""How backbones are written and wrapped: features by index, name or hook, checkpoints, own activations."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as cp
from corpus_blocks import Encoder, Residual, conv
from torch import nn

from benchmarks.zoo.corpus import network


class Inverted(nn.Module):
    """An inverted residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int = 3) -> None:
        super().__init__()
        inner = inputs * expand
        self.use_res_connect = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            conv(inputs, inner, 1), nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            nn.BatchNorm2d(inner), nn.ReLU6(True), nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip

    def forward(self, x):
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


def mobile_features() -> nn.Sequential:
    """Eight layers, at strides 2, 4, 4, 8, 8, 16, 16, 32."""
    shapes = ((8, 8, 2), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 48, 2))
    return nn.Sequential(conv(3, 8, 3, 2), *[Inverted(*shape) for shape in shapes])


@network("modules", "resizing")
class IndexedFeatures(nn.Module):
    """Every layer of a Sequential in turn; those of some numbers are kept for a decoder of depthwise convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.selected = mobile_features(), [2, 4, 6]
        self.decoder = nn.ModuleList([conv(48 + 32, 32), conv(32 + 16, 16), conv(16 + 8, 8)])
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        size, kept = x.shape[-2:], []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.selected:
                kept.append(x)
        for step, skip in zip(self.decoder, kept[::-1]):
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=True)
            x = step(torch.cat([x, skip], dim=1))
        return F.interpolate(self.out(x), size=size, mode="bilinear", align_corners=True)


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


class SamePadding(nn.Conv2d):
    """TensorFlow's "same" for any size, computed in the call (as EfficientNet's)."""

    def forward(self, x):
        ih, iw = x.size()[-2:]
        kh, kw = self.weight.size()[-2:]
        sh, sw = self.stride
        oh, ow = math.ceil(ih / sh), math.ceil(iw / sw)
        pad_h = max((oh - 1) * self.stride[0] + (kh - 1) * self.dilation[0] + 1 - ih, 0)
        pad_w = max((ow - 1) * self.stride[1] + (kw - 1) * self.dilation[1] + 1 - iw, 0)
        if pad_h > 0 or pad_w > 0:
            x = F.pad(x, [pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Swish(torch.autograd.Function):
    """x sigmoid(x) that keeps its input only."""

    @staticmethod
    def forward(ctx, i):
        ctx.save_for_backward(i)
        return i * torch.sigmoid(i)

    @staticmethod
    def backward(ctx, grad):
        i = ctx.saved_tensors[0]
        sigmoid = torch.sigmoid(i)
        return grad * (sigmoid * (1 + i * (1 - sigmoid)))


@network("pads", "decisions", "wrapped")
class SamePaddedMobile(nn.Module):
    """Same padding that depends on the size, squeeze and excitation, an activation as an autograd function."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SamePadding(3, 8, 3, 2, bias=False)
        self.depth1, self.depth2 = SamePadding(8, 8, 5, 2, groups=8), SamePadding(16, 16, 3, 2, groups=16)
        self.point1, self.point2 = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 32, 1)
        self.reduce, self.expand = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.head = nn.Sequential(SamePadding(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 3, 1))

    def forward(self, x):
        y = Swish.apply(self.stem(x))
        y = self.point1(Swish.apply(self.depth1(y)))
        y = Swish.apply(self.depth2(y))
        squeezed = F.adaptive_avg_pool2d(y, 1)
        squeezed = self.expand(Swish.apply(self.reduce(squeezed)))
        y = self.point2(torch.sigmoid(squeezed) * y)
        return F.interpolate(self.head(y), size=x.shape[2:], mode="bilinear")


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


@network("resizing", "sizes", "gates")
class InjectedImage(nn.Module):
    """The image itself, averaged to a feature's size, gates it at every scale."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 8, 16, 32)
        self.steps = nn.ModuleList([conv(a, b, 3, 2) for a, b in zip(widths, widths[1:])])
        self.inject = nn.ModuleList([nn.Conv2d(3, b, 1) for b in widths[1:]])
        self.blocks, self.out = nn.ModuleList([Residual(b, b) for b in widths[1:]]), nn.Conv2d(32, 3, 1)

    def forward(self, image):
        x = image
        for step, inject, block in zip(self.steps, self.inject, self.blocks):
            x = step(x)
            small = F.interpolate(image, size=(x.size(2), x.size(3)), mode="bilinear", align_corners=False)
            x = block(x * torch.sigmoid(inject(small)))
        return self.out(x)


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
