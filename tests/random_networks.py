"""Small random CNNs, written the way users write them: a seed gives a network, images, and how it is called.

What a seed draws: a stem and two or three strided (or dilated) stages of blocks, windows of all kinds, norms,
activations in place or not, residuals, branches, shuffles, gates, a neck that comes back to finer stages, and heads
that return one map, several, or vectors, as a tensor, list, tuple or dictionary. Some unpool, grow maps by transposed
convolutions or pixel shuffles, pad in every mode, crop, ask `if` of shapes, or take another input beside the image.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Draw(random.Random):
    """Random choices."""

    def chance(self, share: float) -> bool:
        return self.random() < share


@dataclass(frozen=True)
class Case:
    """A network and what it is called with.

    Attributes:
        model: in evaluation mode, float64.
        image: (B, 3, H, W), B > 1.
        example: what it is converted with; None for the package's own.
        per_image: whether the images of a batch do not depend on each other.
        more: what it is called with besides, for each image of the batch.
        more_of_example: the same of the example.
        joined: whether the network joins its images and others along the batch, so that there are maps for both.
    """

    model: nn.Module
    image: Tensor
    example: Tensor | None
    per_image: bool
    more: tuple[Tensor, ...] = ()
    more_of_example: tuple[Tensor, ...] = ()
    joined: bool = False

    @property
    def given(self) -> Any:
        """What it is converted with, as `adaptify` takes it."""
        if self.example is None or not self.more_of_example:
            return self.example
        return (self.example, *self.more_of_example)


# -- norms and activations -----------------------------------------------------------------------------------


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "batch, not affine": lambda c: nn.BatchNorm2d(c, affine=False),
    "batch, of the batch": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "group": lambda c: nn.GroupNorm(4 if c % 4 == 0 else 1, c),
    "one group": lambda c: nn.GroupNorm(1, c),
    "instance": nn.InstanceNorm2d,
    "instance, affine": lambda c: nn.InstanceNorm2d(c, affine=True),
    "layer": LayerNorm2d,
    "none": lambda c: nn.Identity(),
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "silu in place": lambda: nn.SiLU(inplace=True),
    "gelu": nn.GELU,
    "leaky": lambda: nn.LeakyReLU(0.1, inplace=True),
    "hardswish": nn.Hardswish,
    "prelu": nn.PReLU,
    "elu": lambda: nn.ELU(inplace=True),
    "relu6": lambda: nn.ReLU6(inplace=True),
    "mish": nn.Mish,
}


@dataclass
class Style:
    """What a network does throughout, most of the time.

    Attributes:
        draw: random choices.
        norm: the usual norm.
        act: the usual activation.
        exact: whether the sizes of images and maps must divide.
    """

    draw: Draw
    norm: str
    act: str
    exact: bool

    @staticmethod
    def of(draw: Draw) -> Style:
        norm = draw.choices(list(NORMS), [10, 1, 1, 2, 1, 1, 1, 2, 1])[0]
        return Style(draw, norm, draw.choice(list(ACTIVATIONS)), draw.chance(0.3))

    def norm_of(self, channels: int) -> nn.Module:
        other = self.draw.chance(0.05)
        return NORMS[self.draw.choice(list(NORMS)) if other else self.norm](channels)

    def activation(self) -> nn.Module:
        other = self.draw.chance(0.1)
        return ACTIVATIONS[self.draw.choice(list(ACTIVATIONS)) if other else self.act]()


# -- windows ------------------------------------------------------------------------------------------------


class PadThen(nn.Module):
    """Pads in its forward, as networks ported from elsewhere do."""

    def __init__(self, pads: list[int], mode: str, then: nn.Module) -> None:
        super().__init__()
        self.pads, self.mode, self.then = pads, mode, then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(F.pad(x, self.pads, mode=self.mode))


PADS: dict[str, Callable[[int], nn.Module]] = {
    "constant": nn.ZeroPad2d,
    "reflect": nn.ReflectionPad2d,
    "replicate": nn.ReplicationPad2d,
    "circular": nn.CircularPad2d,
}


def keeping(style: Style, c_in: int, c_out: int, dilation: int = 1, groups: int = 1) -> nn.Module:
    """A convolution that keeps the size of its map."""
    draw, bias = style.draw, style.draw.chance(0.5)
    kind = draw.choices(
        ["plain", "same", "mode", "padded", "asymmetric", "large", "even"], [8, 1, 2, 2, 1, 1, 1]
    )[0]
    d, common = dilation, {"dilation": dilation, "groups": groups, "bias": bias}
    if kind == "same":
        return nn.Conv2d(c_in, c_out, draw.choice([3, (3, 1), (1, 5)]), padding="same", **common)
    if kind == "even" and d == 1:
        return nn.Conv2d(c_in, c_out, 2, padding="same", **common)
    if kind == "mode":
        mode = draw.choice(["reflect", "replicate", "circular"])
        return nn.Conv2d(c_in, c_out, 3, padding=d, padding_mode=mode, **common)
    if kind == "padded":
        conv = nn.Conv2d(c_in, c_out, 3, **common)
        mode = draw.choice(["constant", "reflect", "replicate", "circular"])
        if draw.chance(0.5):
            return PadThen([d] * 4, mode, conv)
        return nn.Sequential(PADS[mode](d), conv)
    if kind == "asymmetric" and groups == 1:
        k = draw.choice([3, 5, 7]) if d == 1 else 3
        across = nn.Conv2d(c_in, c_out, (1, k), padding=(0, d * (k // 2)), bias=bias, dilation=d)
        return nn.Sequential(across, nn.Conv2d(c_out, c_out, (k, 1), padding=(d * (k // 2), 0), dilation=d))
    if kind == "large" and d == 1:
        return nn.Conv2d(c_in, c_out, 5, padding=2, **common)
    return nn.Conv2d(c_in, c_out, 3, padding=d, **common)


def halving(style: Style, c_in: int, c_out: int) -> nn.Module:
    """A convolution or pool of stride 2."""
    draw = style.draw
    kinds = ["conv"] * 5 + ["max", "average", "depthwise", "blur", "explicit"]
    kind = draw.choice([*kinds, "same", "unshuffle"] if style.exact else kinds)
    if kind == "conv":
        sizes = [(3, 1), (3, 1), (5, 2), (7, 3), (1, 0), (2, 0), (4, 1)]
        k, p = draw.choice(sizes if style.exact else [*sizes, (3, 0)])
        mode = draw.choice(["zeros", "zeros", "reflect", "replicate"]) if p == 1 else "zeros"
        return nn.Conv2d(c_in, c_out, k, 2, p, padding_mode=mode, bias=draw.chance(0.5))
    if kind == "max":
        k, p = draw.choice([(2, 0), (3, 1)] if style.exact else [(2, 0), (3, 1), (3, 0)])
        pool: nn.Module = nn.MaxPool2d(k, 2, p, ceil_mode=draw.chance(0.5) and not style.exact)
    elif kind == "average":
        k, p = draw.choice([(2, 0), (3, 1)])
        partial = draw.chance(0.5) and not style.exact
        pool = nn.AvgPool2d(k, 2, p, ceil_mode=partial, count_include_pad=draw.chance(0.5))
    elif kind == "unshuffle":
        return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * c_in, c_out, 1))
    elif kind == "same":  # as TensorFlow pads even sizes
        return PadThen([0, 1, 0, 1], "constant", nn.Conv2d(c_in, c_out, 3, 2))
    elif kind == "depthwise":
        pool = nn.Conv2d(c_in, c_in, 3, 2, 1, groups=c_in)
    elif kind == "blur":
        pool = Blur(c_in)
    else:
        pads = [nn.ZeroPad2d(1), nn.ReflectionPad2d(1), nn.ConstantPad2d(1, 0.5), nn.CircularPad2d(1)]
        pad: nn.Module = draw.choice(pads)
        pool = nn.Sequential(pad, draw.choice([nn.MaxPool2d(3, 2), nn.AvgPool2d(3, 2)]))
    return nn.Sequential(pool, nn.Conv2d(c_in, c_out, 1))


class Blur(nn.Module):
    """Anti-aliased downsampling (Zhang 2019)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 2.0, 1.0])
        kernel = taps[:, None] * taps[None] / 16
        self.register_buffer("kernel", kernel[None, None].repeat(channels, 1, 1, 1))
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, stride=2, padding=1, groups=self.channels)


# -- blocks that keep channels and size ------------------------------------------------------------------------


def unit(style: Style, c_in: int, c_out: int, dilation: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, norm, activation."""
    conv = keeping(style, c_in, c_out, dilation, groups)
    return nn.Sequential(conv, style.norm_of(c_out), style.activation())


class Residual(nn.Module):
    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.norm1 = style.norm_of(channels)
        self.act = style.activation()
        self.conv2 = keeping(style, channels, channels, dilation)
        self.norm2 = style.norm_of(channels)
        self.how = style.draw.choice(["+=", "add_", "+", "torch.add"])

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        if self.how == "+=":
            out += x
        elif self.how == "add_":
            out = out.add_(x)
        elif self.how == "+":
            out = x + out
        else:
            out = torch.add(out, x, alpha=0.5)
        return self.act(out)


class Preactivated(nn.Module):
    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        self.norm = style.norm_of(channels)
        self.conv1 = keeping(style, channels, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, dilation, dilation)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.norm(x)))
        return x + self.conv2(F.relu_(out))


class Bottleneck(nn.Module):
    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        groups = style.draw.choice([1, 2, 4])
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False),
            style.norm_of(channels),
            style.activation(),
            *unit(style, channels, channels, dilation, groups),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.block(x) + x, inplace=True)


class SqueezeExcite(nn.Module):
    def __init__(self, style: Style, channels: int) -> None:
        super().__init__()
        self.how = style.draw.choice(["pool", "mean", "function", "linear", "flat", "largest", "spread"])
        layer = nn.Linear if self.how == "linear" else lambda a, b: nn.Conv2d(a, b, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = layer(channels, channels // 2), layer(channels // 2, channels)
        self.gate = style.draw.choice([nn.Sigmoid(), nn.Hardsigmoid()])

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "linear":
            b, c, _, _ = x.shape
            y = self.pool(x).view(b, c)
            return x * self.gate(self.fc2(F.relu(self.fc1(y)))).view(b, c, 1, 1).expand_as(x)
        if self.how == "pool":
            y = self.pool(x)
        elif self.how == "mean":
            y = x.mean((2, 3), keepdim=True)
        elif self.how == "flat":
            y = x.flatten(2).mean(-1)[:, :, None, None]
        elif self.how == "largest":
            y = torch.amax(x, dim=(-2, -1), keepdim=True)
        elif self.how == "spread":
            y = x.mean([-2, -1], keepdim=True) + x.std(dim=(2, 3), keepdim=True)
        else:
            y = F.adaptive_avg_pool2d(x, 1)
        return x * self.gate(self.fc2(F.relu(self.fc1(y), inplace=True)))


class Inverted(nn.Module):
    """As MobileNetV3."""

    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.expand = nn.Sequential(nn.Conv2d(channels, wide, 1), style.norm_of(wide), style.activation())
        self.depthwise = unit(style, wide, wide, dilation, groups=wide)
        self.gate = SqueezeExcite(style, wide) if style.draw.chance(0.5) else nn.Identity()
        self.project = nn.Sequential(nn.Conv2d(wide, channels, 1), style.norm_of(channels))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.project(self.gate(self.depthwise(self.expand(x)))))


class ChannelsLast(nn.Module):
    """As ConvNeXt, with or without V2's response norm."""

    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        self.depthwise = keeping(style, channels, channels, dilation, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.scale = nn.Parameter(torch.rand(channels) + 0.5)
        self.response = style.draw.chance(0.3)
        self.gamma = nn.Parameter(torch.rand(2 * channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = F.gelu(self.up(self.norm(y)))
        if self.response:
            size = torch.norm(y, p=2, dim=(1, 2), keepdim=True)
            y = y + self.gamma * (y * (size / (size.mean(dim=-1, keepdim=True) + 1e-6)))
        return x + (self.scale * self.down(y)).permute(0, 3, 1, 2)


class Shuffle(nn.Module):
    """As ShuffleNetV2."""

    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(nn.Conv2d(half, half, 1), *unit(style, half, half, dilation, half))
        self.groups, self.how = 2, style.draw.choice(["view", "reshape", "sizes"])

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        x = torch.cat((left, self.branch(right)), dim=1)
        if self.how == "sizes":
            b, c, h, w = x.size(0), x.size(1), x.size(2), x.size(3)
        else:
            b, c, h, w = x.shape
        shape = (b, self.groups, c // self.groups, h, w)
        x = x.view(*shape) if self.how == "view" else x.reshape(shape)
        return torch.transpose(x, 1, 2).contiguous().view(b, c, h, w)


class Inception(nn.Module):
    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        part = channels // 4
        include = style.draw.chance(0.5)
        self.branches = nn.ModuleList(
            [
                nn.Conv2d(channels, part, 1),
                nn.Sequential(nn.Conv2d(channels, part, 1), *unit(style, part, part, dilation)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(channels, part, 1)),
                nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=include), nn.Conv2d(channels, part, 1)),
            ]
        )
        self.norm = style.norm_of(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(torch.cat([branch(x) for branch in self.branches], 1)), 0.2)


class DenseBlock(nn.Module):
    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([unit(style, channels + 4 * i, 4, dilation) for i in range(2)])
        self.fuse = nn.Conv2d(channels + 8, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.fuse(torch.cat(features, 1))


class Hierarchical(nn.Module):
    """As Res2Net."""

    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        self.width = channels // 4
        self.convs = nn.ModuleList([unit(style, self.width, self.width, dilation) for _ in range(3)])
        self.unequal = style.draw.chance(0.3)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(x, self.width, dim=1)
        done = [parts[0]]
        y = parts[1]
        for i, conv in enumerate(self.convs):
            y = conv(y)
            done.append(y)
            if i < 2:
                y = y + parts[i + 2]
        return torch.cat(done, 1) + x


class SpatialGate(nn.Module):
    """As CBAM."""

    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        self.squeeze = SqueezeExcite(style, channels)
        self.conv = nn.Conv2d(2, 1, 3, padding=dilation, dilation=dilation)
        self.largest = nn.AdaptiveMaxPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x) + 0.1 * self.largest(x)
        mean, largest = x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]
        return x * torch.sigmoid(self.conv(torch.cat([mean, largest], dim=1)))


class PoolMixer(nn.Module):
    """As PoolFormer."""

    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.scale = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, channels, 1), nn.GELU(), nn.Conv2d(channels, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.scale * (self.pool(y) - y)
        return x + self.scale.unsqueeze(0) * self.mlp(x)


class Partial(nn.Module):
    """As FasterNet: some channels only, by slices."""

    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        self.count = channels // 4
        self.conv = keeping(style, self.count, self.count, dilation)
        self.norm = style.norm_of(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat((self.conv(x[:, : self.count]), x[:, self.count :]), 1)
        return x + F.hardswish(self.norm(y))


class Pyramid(nn.Module):
    """As ASPP: dilated branches and the image as a whole."""

    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        half = channels // 2
        self.branches = nn.ModuleList(
            [nn.Conv2d(channels, half, 1)]
            + [nn.Conv2d(channels, half, 3, padding=r * dilation, dilation=r * dilation) for r in (1, 2)]
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, half, 1), nn.ReLU())
        self.project = nn.Sequential(nn.Conv2d(4 * half, channels, 1), style.norm_of(channels), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        parts = [branch(x) for branch in self.branches]
        pooled = F.interpolate(self.pool(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.project(torch.cat([*parts, pooled], dim=1))


class Steps(nn.Module):
    """Plain units, written out in place."""

    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = keeping(style, channels, channels, dilation)
        self.conv2 = keeping(style, channels, channels, dilation, groups=style.draw.choice([1, 2]))
        self.norm = style.norm_of(channels)
        self.gain = nn.Parameter(torch.rand(1, channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu_()
        x = self.norm(self.conv2(x))
        x *= self.gain
        x = x.add_(0.1).clamp_(-3, 3)
        return torch.tanh(x) * 2.0 - 0.5


class PooledPyramid(nn.Module):
    """As YOLO's SPPF: a large pool three times in a row."""

    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        size = style.draw.choice([3, 5])
        self.pool = nn.MaxPool2d(size, stride=1, padding=size // 2)
        self.fuse = unit(style, 4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y1 = self.pool(x)
        y2 = self.pool(y1)
        return self.fuse(torch.cat((x, y1, y2, self.pool(y2)), 1))


class Gated(nn.Module):
    """Gated linear units, and the same convolution called twice."""

    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv = keeping(style, channels, 2 * channels, dilation)
        self.again = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.how = style.draw.choice(["glu", "split", "slices"])

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.how == "glu":
            y = F.glu(y, dim=1)
        elif self.how == "split":
            one, other = torch.split(y, [y.size(1) // 2, y.size(1) - y.size(1) // 2], dim=1)
            y = one * other.sigmoid()
        else:
            y = y[:, ::2] * torch.sigmoid(y[:, 1::2])
        return x + 0.5 * self.again(F.relu(self.again(y)))


class Arithmetic(nn.Module):
    """Formulas on maps."""

    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv = keeping(style, channels, channels, dilation)
        self.alpha = nn.Parameter(torch.rand(channels))
        self.register_buffer("shift", torch.rand(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) * self.alpha.view(1, -1, 1, 1) + self.shift
        gate = torch.sigmoid(-y)
        y = (1 - gate) * x + gate * (y**2) / 4
        return torch.addcmul(x, y, gate, value=0.5).clamp(min=-2.0)


class PreactivatedInPlace(nn.Module):
    """As the first pre-activated ResNets: the activation changes the shortcut, too."""

    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = keeping(style, channels, channels, dilation)
        self.norm = style.norm_of(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(x)
        out = self.norm(self.conv1(out))
        out = self.conv2(self.relu(out))
        return out + x


class PartsInPlace(nn.Module):
    """Halves of the channels, one of them changed in place."""

    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv = keeping(style, channels // 2, channels // 2, dilation)
        self.act = nn.ReLU(inplace=True)
        self.whole = style.draw.chance(0.3)

    def forward(self, x: Tensor) -> Tensor:
        one, other = x.chunk(2, 1)
        one = self.act(one)
        y = torch.cat((self.conv(one), other), 1)
        return x + y if self.whole else y


class Standardised(nn.Module):
    """A convolution whose weight is computed in the forward, and functional norms."""

    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels // 2, 3, 3))
        self.bias = nn.Parameter(torch.rand(channels))
        self.dilation, self.how = dilation, style.draw.choice(["group", "instance", "batch", "normalize"])
        self.register_buffer("mean", 0.1 * torch.randn(channels))
        self.register_buffer("var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        w = w / (w.std(dim=(1, 2, 3), keepdim=True) * 8)
        y = F.conv2d(x, w, self.bias, 1, self.dilation, self.dilation, groups=2)
        if self.how == "group":
            y = F.group_norm(y, 2)
        elif self.how == "instance":
            y = F.instance_norm(y)
        elif self.how == "batch":
            y = F.batch_norm(y, self.mean, self.var, training=False)
        else:
            y = F.normalize(y, dim=1)
        return x + F.silu(y, inplace=True)


class Unpooled(nn.Module):
    """As SegNet: pooled with indices, changed, and put back where it came from."""

    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, return_indices=True, ceil_mode=style.draw.chance(0.3))
        self.unpool = nn.MaxUnpool2d(2)
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.conv2 = keeping(style, channels, channels)
        self.how = style.draw.choice(["size", "module", "function"])

    def forward(self, x: Tensor) -> Tensor:
        y, indices = self.pool(F.relu(x))
        y = F.relu(self.conv1(y))
        if self.how == "module":
            y = self.unpool(y, indices, output_size=x.shape[-2:])
        elif self.how == "size":
            y = self.unpool(y, indices, x.size())
        else:
            y = F.max_unpool2d(y, indices, 2, output_size=x.shape[-2:])
        return x + self.conv2(y)


class Regrown(nn.Module):
    """Halved, and grown by a transposed convolution with output padding; what is too much is cut off."""

    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, channels, 3, 2, 1)
        k, p, more = style.draw.choice([(3, 1, 1), (2, 0, 0), (4, 1, 0), (5, 2, 1), (3, 0, 0)])
        self.up = nn.ConvTranspose2d(channels, channels, k, 2, p, more)
        self.how = style.draw.choice(["crop", "if", "size", "resize"])
        self.act = style.activation()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.down(x))
        if self.how == "size" and self.up.kernel_size[0] - 2 * self.up.padding[0] == 1:
            return x + self.act(self.up(y, output_size=x.shape[-2:]))
        y = self.up(y)
        if self.how == "crop":
            y = y[:, :, : x.shape[2], : x.shape[3]]
        elif self.how == "if":
            if y.shape[-2:] != x.shape[-2:]:
                y = F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)
        else:
            y = F.interpolate(y, size=x.shape[-2:], mode="nearest")
        return x + self.act(y)


class Cropped(nn.Module):
    """Unpadded convolutions and a skip that is cropped at its centre, and padded again."""

    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3)
        self.how = style.draw.choice(["slices", "centre", "pad", "narrow", "negative"])
        self.mode = style.draw.choice(["constant", "replicate"])  # maps may be a sample wide

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.how == "slices":
            skip = x[:, :, 1:-1, 1:-1]
        elif self.how == "centre":
            top, left = (x.shape[2] - y.shape[2]) // 2, (x.shape[3] - y.shape[3]) // 2
            skip = x[:, :, top : top + y.shape[2], left : left + y.shape[3]]
        elif self.how == "pad":
            return x + F.pad(y, [1] * 4, mode=self.mode)
        elif self.how == "narrow":
            skip = x.narrow(2, 1, y.size(2)).narrow(3, 1, y.size(3))
        else:
            skip = F.pad(x, (-1, -1, -1, -1))
        return F.pad(F.relu(skip + y), (1, 1, 1, 1), mode=self.mode)


class Shuffled(nn.Module):
    """Pixels into channels and back."""

    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, channels, 3, 2, 1)
        self.wide = nn.Conv2d(channels, 4 * channels, style.draw.choice([1, 3]), padding="same")
        self.shuffle = nn.PixelShuffle(2)
        self.function = style.draw.chance(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(F.relu(self.down(x)))
        y = F.pixel_shuffle(y, 2) if self.function else self.shuffle(y)
        if x.shape != y.shape:
            y = y[..., : x.shape[-2], : x.shape[-1]]
        return x + y


class Asked(nn.Module):
    """Asks of shapes what to do: pads odd maps, resizes what does not fit, goes back to its size."""

    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2)
        self.conv = keeping(style, channels, channels)
        self.how = style.draw.choice(["odd", "fit", "large"])
        self.mode = style.draw.choice(["constant", "reflect", "replicate", "circular"])

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        y = x
        if self.how == "odd":
            if height % 2 or width % 2:
                y = F.pad(y, (0, width % 2, 0, height % 2), mode=self.mode)
        elif self.how == "large" and height * width > 64:
            y = F.relu(y)
        y = self.conv(self.pool(y))
        if x.shape[-2:] != y.shape[-2:]:
            y = F.interpolate(y, x.shape[-2:])
        return x + y


class Strange(nn.Module):
    """What no lattice passes, but for bins: the region ends here."""

    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        self.how = style.draw.choice(["where", "roll", "lrn", "flip", "lp", "bins", "positions"])
        self.lrn = nn.LocalResponseNorm(2)
        self.lp = nn.LPPool2d(2, 3, 1)
        self.bins = nn.AdaptiveAvgPool2d(2)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "where":
            x = torch.where(x > 0, x, 0.1 * x)
        elif self.how == "roll":
            x = torch.roll(x, 1, dims=3)
        elif self.how == "lrn":
            x = self.lrn(x)
        elif self.how == "flip":
            x = x + x.flip(-1)
        elif self.how == "lp":
            x = F.pad(self.lp(x.abs()), (1, 1, 1, 1))
        elif self.how == "bins":
            x = x + F.interpolate(self.bins(x), size=x.shape[2:], mode="bilinear", align_corners=True)
        else:
            x = x + torch.linspace(0, 1, x.shape[3], dtype=x.dtype)
        return self.conv(x)


BLOCKS: list[Any] = [
    Residual,
    Preactivated,
    Bottleneck,
    Inverted,
    ChannelsLast,
    Shuffle,
    Inception,
    DenseBlock,
]
BLOCKS += [Hierarchical, SpatialGate, PoolMixer, Partial, Pyramid, Steps, PooledPyramid, Gated, Arithmetic]
BLOCKS += [PreactivatedInPlace, PartsInPlace, Standardised, Residual, Inverted]
BLOCKS += [Unpooled, Regrown, Cropped, Shuffled, Asked]


class Halved(nn.Module):
    """A strided residual, its shortcut strided or pooled."""

    def __init__(self, style: Style, c_in: int, c_out: int) -> None:
        super().__init__()
        mode = style.draw.choice(["zeros", "zeros", "zeros", "reflect", "circular"])
        self.conv1 = nn.Conv2d(c_in, c_out, 3, 2, 1, padding_mode=mode, bias=False)
        self.norm1, self.norm2 = style.norm_of(c_out), style.norm_of(c_out)
        self.conv2 = keeping(style, c_out, c_out)
        if style.draw.chance(0.5):
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, 2, bias=False), style.norm_of(c_out))
        else:
            pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
            self.shortcut = nn.Sequential(pool, nn.Conv2d(c_in, c_out, 1), style.norm_of(c_out))
        self.act = style.activation()

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        return self.act(out)


# -- heads --------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self, style: Style, widths: list[int]) -> None:
        super().__init__()
        self.head = nn.Conv2d(widths[-1], 5, style.draw.choice([1, 3]))
        self.soft = style.draw.chance(0.2)

    def forward(self, maps: list[Tensor], image: Tensor) -> Tensor:
        y = self.head(maps[-1])
        return F.softmax(y, dim=1) if self.soft else y


class Several(nn.Module):
    """Maps of several stages and a vector, as a tuple, list or dictionary."""

    def __init__(self, style: Style, widths: list[int]) -> None:
        super().__init__()
        self.main, self.aux = nn.Conv2d(widths[-1], 5, 1), nn.Conv2d(widths[-2], 4, 3, padding=1)
        self.fc = nn.Linear(widths[-1], 6)
        self.how = style.draw.choice(["tuple", "list", "dict", "maps"])

    def forward(self, maps: list[Tensor], image: Tensor) -> Any:
        main, aux = self.main(maps[-1]), F.relu(self.aux(maps[-2]))
        logits = self.fc(torch.flatten(F.adaptive_avg_pool2d(maps[-1], (1, 1)), 1))
        if self.how == "tuple":
            return main, aux, logits
        if self.how == "list":
            return [main, logits]
        if self.how == "maps":
            return {f"p{i}": y for i, y in enumerate(maps)}
        return {"out": main, "aux": aux, "logits": logits}


class Classify(nn.Module):
    def __init__(self, style: Style, widths: list[int]) -> None:
        super().__init__()
        self.pool, self.drop = nn.AdaptiveAvgPool2d((1, 1)), nn.Dropout(0.2)
        self.fc = nn.Linear(widths[-1], 10)

    def forward(self, maps: list[Tensor], image: Tensor) -> Tensor:
        return self.fc(self.drop(torch.flatten(self.pool(maps[-1]), 1)))


class TopDown(nn.Module):
    """A feature pyramid: coarse maps resized onto finer ones, with a convolution after each sum."""

    def __init__(self, style: Style, widths: list[int]) -> None:
        super().__init__()
        self.lateral = nn.ModuleList([nn.Conv2d(width, 8, 1) for width in widths])
        self.smooth = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in widths])
        self.mode = style.draw.choice(["nearest", "bilinear", "corners"])
        self.all, self.join = style.draw.chance(0.5), style.draw.choice(["add", "cat"])
        self.merge = nn.ModuleList([nn.Conv2d(16, 8, 1) for _ in widths])

    def forward(self, maps: list[Tensor], image: Tensor) -> Any:
        y = self.lateral[-1](maps[-1])
        found = [self.smooth[-1](y)]
        for i in range(len(maps) - 2, -1, -1):
            side = self.lateral[i](maps[i])
            options = {} if self.mode == "nearest" else {"align_corners": self.mode == "corners"}
            how = "nearest" if self.mode == "nearest" else "bilinear"
            y = F.interpolate(y, size=side.shape[2:], mode=how, **options)
            y = y + side if self.join == "add" else self.merge[i](torch.cat([y, side], 1))
            found.append(self.smooth[i](y))
        return tuple(found) if self.all else found[-1]


class Doubled(nn.Module):
    """A decoder that doubles by factor, for sizes that divide."""

    def __init__(self, style: Style, widths: list[int]) -> None:
        super().__init__()
        mode = style.draw.choice(["nearest", "bilinear"])
        self.up = nn.Upsample(scale_factor=2, mode=mode)
        self.block = nn.Sequential(*unit(style, widths[-1] + widths[-2], 8))
        self.head = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, maps: list[Tensor], image: Tensor) -> Tensor:
        return self.head(self.block(torch.cat((self.up(maps[-1]), maps[-2]), 1)))


class Resized(nn.Module):
    """A map at the size of the image, or some factor larger."""

    def __init__(self, style: Style, widths: list[int]) -> None:
        super().__init__()
        draw = style.draw
        self.head = nn.Sequential(*unit(style, widths[-1], 8), nn.Conv2d(8, 4, 1))
        self.mode = draw.choice(["nearest", "bilinear", "bilinear", "corners"])
        self.by = draw.choice(["size", "size", "factor", "half", "module"])
        self.after = draw.choice(["none", "sigmoid", "softmax"])
        mode = "nearest" if self.mode == "nearest" else "bilinear"
        align = {} if mode == "nearest" else {"align_corners": self.mode == "corners"}
        self.how: dict[str, Any] = {"mode": mode, **align}
        self.up = nn.Upsample(scale_factor=draw.choice([2, 4, 8]), **self.how)

    def resized(self, y: Tensor, image: Tensor) -> Tensor:
        if self.by == "size":
            return F.interpolate(y, size=image.shape[-2:], **self.how)
        if self.by == "half":
            return F.interpolate(y, (image.shape[2] // 2, image.shape[3] // 2), **self.how)
        if self.by == "factor":
            return F.interpolate(y, scale_factor=4.0, **self.how)
        return self.up(y)

    def forward(self, maps: list[Tensor], image: Tensor) -> Any:
        y = self.resized(self.head(maps[-1]), image)
        return {"none": lambda y: y, "sigmoid": torch.sigmoid, "softmax": lambda y: F.softmax(y, 1)}[
            self.after
        ](y)


class TwoResized(Resized):
    """With an auxiliary output, as torchvision's segmentation networks."""

    def __init__(self, style: Style, widths: list[int]) -> None:
        super().__init__(style, widths)
        self.aux = nn.Conv2d(widths[-2], 4, 1)

    def forward(self, maps: list[Tensor], image: Tensor) -> Any:
        result = {"out": self.resized(self.head(maps[-1]), image)}
        result["aux"] = self.resized(self.aux(maps[-2]), image)
        return result


class Skips(nn.Module):
    """As FCN: scores of several stages, each resized onto the next finer one and added; the sum at the image's size."""

    def __init__(self, style: Style, widths: list[int]) -> None:
        super().__init__()
        self.scores = nn.ModuleList([nn.Conv2d(width, 4, 1) for width in widths[1:]])

    def forward(self, maps: list[Tensor], image: Tensor) -> Tensor:
        scores = [score(x) for score, x in zip(self.scores, maps[1:], strict=True)]
        y = scores.pop()
        while scores:
            side = scores.pop()
            y = F.interpolate(y, side.shape[-2:], mode="bilinear", align_corners=False)
            y = y.add_(side)
        return F.interpolate(y, size=image.shape[-2:], mode="bilinear", align_corners=False)


class AllStages(nn.Module):
    """As SegFormer's head: every stage at the size of the first, mixed, at the size of the image."""

    def __init__(self, style: Style, widths: list[int]) -> None:
        super().__init__()
        self.lateral = nn.ModuleList([nn.Conv2d(width, 4, 1) for width in widths])
        self.fuse = nn.Sequential(
            nn.Conv2d(4 * len(widths), 8, style.draw.choice([1, 3]), padding="same"), nn.ReLU()
        )
        self.last, self.to_image = nn.Conv2d(8, 3, 1), style.draw.chance(0.7)

    def forward(self, maps: list[Tensor], image: Tensor) -> Tensor:
        size = maps[0].shape[2:]
        parts = [
            F.interpolate(lateral(x), size=size, mode="bilinear", align_corners=False)
            for lateral, x in zip(self.lateral, maps, strict=True)
        ]
        y = self.last(self.fuse(torch.cat(parts, dim=1)))
        return F.interpolate(y, image.shape[2:], mode="bilinear") if self.to_image else y


class Transposed(nn.Module):
    """A decoder of transposed convolutions."""

    def __init__(self, style: Style, widths: list[int]) -> None:
        super().__init__()
        self.conv = unit(style, widths[-1], 8)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.last = nn.ConvTranspose2d(8, 3, 4, 2, 1)

    def forward(self, maps: list[Tensor], image: Tensor) -> Tensor:
        return self.last(F.relu(self.up(self.conv(maps[-1]))))


class Grown(nn.Module):
    """Transposed convolutions with output padding up to a stage's size, its map added, cropped where one is larger."""

    def __init__(self, style: Style, widths: list[int]) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(widths[-1], widths[-2], 3, 2, 1, output_padding=1)
        self.conv = unit(style, widths[-2], 8)
        self.last = nn.ConvTranspose2d(8, 3, 5, 2, 2, output_padding=1)
        self.both = style.draw.chance(0.5)

    def forward(self, maps: list[Tensor], image: Tensor) -> Any:
        y, skip = self.up(F.relu(maps[-1])), maps[-2]
        height, width = min(y.shape[2], skip.shape[2]), min(y.shape[3], skip.shape[3])
        y = self.conv(y[:, :, :height, :width] + skip[:, :, :height, :width])
        return (self.last(y), y) if self.both else self.last(y)


class SubPixels(nn.Module):
    """As ESPCN: pixels of the result are channels of the last map."""

    def __init__(self, style: Style, widths: list[int]) -> None:
        super().__init__()
        self.conv, self.last = unit(style, widths[-1], 8), nn.Conv2d(8, 3 * 16, 3, padding=1)
        self.shuffle = nn.PixelShuffle(style.draw.choice([2, 4]))
        self.cut = style.draw.chance(0.3)

    def forward(self, maps: list[Tensor], image: Tensor) -> Tensor:
        y = self.shuffle(self.last(self.conv(maps[-1])))
        return y[:, :, 2:-2, 2:-2] if self.cut else y


class Fitted(nn.Module):
    """A pyramid that resizes only what does not fit."""

    def __init__(self, style: Style, widths: list[int]) -> None:
        super().__init__()
        self.lateral = nn.ModuleList([nn.Conv2d(width, 8, 1) for width in widths])
        self.last = nn.Conv2d(8, 4, 3, padding=1, padding_mode=style.draw.choice(["zeros", "circular"]))
        self.named = style.draw.chance(0.5)

    def forward(self, maps: list[Tensor], image: Tensor) -> Any:
        y = self.lateral[-1](maps[-1])
        for lateral, x in zip(self.lateral[-2::-1], maps[-2::-1], strict=True):
            side = lateral(x)
            if y.shape[-2:] != side.shape[-2:]:
                y = F.interpolate(y, side.shape[-2:])
            y = F.relu(y + side)
        y = self.last(y)
        if self.named:
            return {"map": y, "mean": y.mean((2, 3)), "deep": maps[-1]}
        return [y, (maps[-1], y.mean((2, 3)))]


class ShuffledMean(nn.Module):
    """A pixel shuffle, and a mean over the image behind it: as a vector, as a gate, of bins, or beside a map."""

    def __init__(self, style: Style, widths: list[int]) -> None:
        super().__init__()
        factor = style.draw.choice([2, 2, 4])
        self.wide, self.shuffle = (
            nn.Conv2d(widths[-1], 8 * factor * factor, 3, padding=1),
            nn.PixelShuffle(factor),
        )
        self.conv = unit(style, 8, 8)
        self.how = style.draw.choice(["mean", "pool", "gate", "bins", "sum", "std", "largest", "both"])

    def forward(self, maps: list[Tensor], image: Tensor) -> Any:
        y = self.conv(self.shuffle(self.wide(maps[-1])))
        if self.how == "gate":
            return y * torch.sigmoid(y.mean((2, 3), keepdim=True))
        if self.how == "both":
            return y, F.adaptive_avg_pool2d(y, 1).flatten(1)
        return {
            "mean": lambda: torch.mean(y, [-1, -2]),
            "pool": lambda: F.adaptive_avg_pool2d(y, 1),
            "bins": lambda: F.adaptive_avg_pool2d(y, (2, 3)),
            "sum": lambda: torch.sum(y, (2, 3), True) / 100,
            "std": lambda: torch.std(y, (2, 3), False),
            "largest": lambda: y.amax((2, 3)),
        }[self.how]()


class Positional(nn.Module):
    """Calls whose arguments are passed by place."""

    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv = keeping(style, channels, channels)
        self.how = style.draw.sample(sorted(self.CALLS), 3)

    CALLS: ClassVar[dict[str, Callable[[Tensor], Tensor]]] = {
        "avg_pool2d": lambda y: F.avg_pool2d(y, 3, 1, 1, False, False),
        "avg_pool2d by a divisor": lambda y: F.avg_pool2d(y, 3, 1, 1, False, True, 7),
        "max_pool2d": lambda y: F.max_pool2d(y, 3, 1, 1, 1, False),
        "var": lambda y: y + torch.var(y, 1, False, True),
        "var of the image": lambda y: y * torch.sigmoid(torch.var(y, (2, 3), False, True)),
        "norm": lambda y: y / (1 + torch.norm(y, 2, 1, True)),
        "normalize": lambda y: y + F.normalize(y, 1.0, 1, 0.1),
        "cumsum": lambda y: torch.cumsum(y, 1) / 4,
        "roll": lambda y: torch.roll(y, 1, 1),
        "topk": lambda y: y + torch.topk(y, 1, 1)[0],
        "where": lambda y: torch.where(y > 0.1, y, y * 0.2),
        "masked_fill": lambda y: y.masked_fill(y < -1, -1.0),
        "addcmul": lambda y: torch.addcmul(y, y, y, value=0.1),
        "clamp": lambda y: torch.clamp(y, -2, 2),
        "narrow": lambda y: torch.cat((y.narrow(1, 1, y.size(1) - 1), y[:, :1]), 1),
        "repeat": lambda y: y + y[:, :1].repeat(1, y.shape[1], 1, 1),
    }

    def forward(self, x: Tensor) -> Tensor:
        for name in self.how:
            x = self.CALLS[name](x)
        return self.conv(x)


class Written(nn.Module):
    """Writes to channels of its map, or into zeros."""

    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv = keeping(style, channels, channels)
        self.how = style.draw.choice(["half", "one", "zeros", "last", "chosen"])

    def forward(self, x: Tensor) -> Tensor:
        y, half = self.conv(x), x.shape[1] // 2
        if self.how == "half":
            y[:, :half] = x[:, half : 2 * half]
        elif self.how == "one":
            y[:, 0] = torch.tanh(y[:, 1])
        elif self.how == "zeros":
            y = y.new_zeros(y.shape)
            y[:, 1:] = x[:, 1:] * 0.5
        elif self.how == "last":
            y = y.permute(0, 2, 3, 1)
            y[..., -1] = 0.25
            y = y.permute(0, 3, 1, 2)
        else:
            y[y > 1] = 1.0
        return y + x


class Uneven(nn.Module):
    """A sum or a concatenation of two ways to halve a map, whose sizes differ where they round differently."""

    def __init__(self, style: Style, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(channels, channels, 3, 2, 1), nn.MaxPool2d(2)
        self.join = nn.Conv2d(2 * channels, channels, 1)
        self.up = nn.Upsample(scale_factor=2, mode=style.draw.choice(["nearest", "bilinear"]))
        self.how = style.draw.choice(["sum", "cat", "max"])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.conv(x), self.pool(x)
        if self.how == "sum":
            y = first + second
        elif self.how == "max":
            y = torch.maximum(first, second)
        else:
            y = self.join(torch.cat([first, second], 1))
        return x + self.up(y)


ENDINGS: list[Any] = [Resized, Resized, TwoResized, Skips, AllStages]
HEADS: list[Any] = [Plain, Plain, Several, Several, Classify, TopDown, TopDown, Transposed, *ENDINGS]
HEADS += [Grown, SubPixels, Fitted]


# What seeds from here on draw most of the time, as well.
LATER = 10_000
LATER_BLOCKS: list[Any] = [Positional, Written, Uneven, Positional, Written, *BLOCKS[:8]]


class Network(nn.Module):
    def __init__(self, draw: Draw, later: bool = False) -> None:
        super().__init__()
        style = Style.of(draw)
        style.exact |= later
        widths = draw.choice([[8, 12, 16], [12, 16, 24], [16, 16, 16], [8, 16, 24, 32]])
        kind = draw.choice([*HEADS, Doubled, Doubled] if style.exact else HEADS)
        blocks_of_all = LATER_BLOCKS if later else BLOCKS
        kind = ShuffledMean if later and draw.chance(0.4) else kind
        stages, dilation = [], 1
        self.stem, own = self._stem(style, widths[0])
        for c_in, c_out in pairwise(widths):
            if kind is not Doubled and (draw.chance(0.25) or dilation > 1):
                dilation *= 2
                first: nn.Module = unit(style, c_in, c_out, dilation)
            elif draw.chance(0.5):
                own *= 2
                first = Halved(style, c_in, c_out)
            else:
                own *= 2
                first = nn.Sequential(halving(style, c_in, c_out), style.norm_of(c_out), style.activation())
            kinds = [
                Strange if draw.chance(0.03) else draw.choice(blocks_of_all)
                for _ in range(draw.choice([1, 1, 2]))
            ]
            own_dilation = [draw.choices([dilation, 1, 2 * dilation, 3], [20, 1, 1, 1])[0] for _ in kinds]
            blocks = [block(style, c_out, d) for block, d in zip(kinds, own_dilation, strict=True)]
            stages.append(nn.Sequential(first, *blocks))
        self.stages = nn.ModuleList(stages)
        self.head = kind(style, widths)
        uneven = any(isinstance(module, Uneven) for module in self.modules())
        self.low, self.step = own * dilation, (2 * own if uneven else own) if style.exact else 1

    @staticmethod
    def _stem(style: Style, width: int) -> tuple[nn.Module, int]:
        draw = style.draw
        k, p = draw.choice([(3, 1), (7, 3), (5, 2), (2, 0), (4, 1)])
        stem = [nn.Conv2d(3, width, k, 2, p, bias=False), style.norm_of(width), style.activation()]
        kind = draw.choices(["plain", "full", "patches", "pooled"], [12, 2, 1, 1])[0]
        if kind == "full":
            stem = [nn.Conv2d(3, width, 3, 1, 1), nn.ReLU(), halving(style, width, width)]
        elif kind == "patches":
            stem = [nn.Conv2d(3, width, 4, 4), LayerNorm2d(width)]
        elif kind == "pooled":
            stem = [*stem, nn.MaxPool2d(3, 2, 1)]
        return nn.Sequential(*stem), 4 if kind in ("patches", "pooled") else 2

    def forward(self, image: Tensor) -> Any:
        x = self.stem(image)
        maps = [x]
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return self.head(maps, image)


class Conditioned(Network):
    """Takes another input besides: a second image, a map of one channel, or a vector for each image."""

    def __init__(self, draw: Draw, later: bool = False) -> None:
        super().__init__(draw, later)
        self.kind, self.join = draw.choice(["image", "map", "vector"]), nn.Conv2d(3, 3, 1)
        if self.kind == "image":
            self.other: nn.Module = nn.Conv2d(3, 3, 3, padding=1)
        else:
            self.other = nn.Conv2d(1, 3, 3, padding=1) if self.kind == "map" else nn.Linear(4, 3)

    def more(self, image: Tensor) -> Tensor:
        """What it is called with besides an image batch."""
        shapes = {"image": image.shape, "map": (len(image), 1, *image.shape[2:]), "vector": (len(image), 4)}
        return torch.randn(shapes[self.kind], dtype=image.dtype)

    def forward(self, image: Tensor, more: Tensor) -> Any:
        more = self.other(more)
        if self.kind == "vector":
            more = more[:, :, None, None]
        return super().forward(self.join(image) + more)


class Mirrored(Network):
    """Joins the images and their mirror images along the batch, and takes the mean of both results."""

    def forward(self, image: Tensor) -> Any:
        both, count = super().forward(torch.cat([image, image.flip(3)], 0)), image.shape[0]
        return torch.utils._pytree.tree_map(lambda value: value[:count] + value[count:], both)


# -- a seed -------------------------------------------------------------------------------------------------


def settled(model: nn.Module, image: Tensor, draw: Draw, *more: Tensor) -> nn.Module:
    """Batch norms with the statistics of an image, disturbed, and random affine parts; in evaluation mode."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    model.train()
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        model(image, *more)
    for norm in norms:
        norm.momentum = 0.1
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            norm.running_var *= 0.8 + 0.4 * torch.rand_like(norm.running_var)
    for name, parameter in model.named_parameters():
        constant = bool((parameter == parameter.flatten()[0]).all())
        if constant:
            at = 1.0 if name.endswith("weight") else 0.0
            parameter.data = at + 0.3 * torch.randn_like(parameter)
    return model.eval()


def random_case(seed: int) -> Case:
    """The network, images and example of a seed."""
    draw = Draw(seed)
    torch.manual_seed(seed)
    later = seed >= LATER
    kind = Conditioned if draw.chance(0.15) else Mirrored if later and draw.chance(0.15) else Network
    model = kind(draw, later).double()
    least, step = 3 * model.low + 10, model.step

    def length() -> int:
        return -(-draw.randint(least, least + 20) // step) * step

    batch, own_memory = draw.choice([2, 2, 3]), draw.chance(0.3)
    image = torch.randn(batch, 3, length(), length(), dtype=torch.float64)
    image += F.interpolate(torch.randn(batch, 3, 4, 5, dtype=torch.float64), image.shape[2:], mode="bicubic")
    example = torch.randn(draw.choice([1, 2]), 3, length(), length(), dtype=torch.float64)
    more = (model.more(image),) if isinstance(model, Conditioned) else ()
    more_of_example = (model.more(example),) if isinstance(model, Conditioned) else ()
    settled(model, image, draw, *more)
    if own_memory:
        image = image.contiguous(memory_format=torch.channels_last)
    per_image = not any(
        isinstance(module, nn.BatchNorm2d) and module.running_mean is None for module in model.modules()
    )
    own = step == 1 and draw.chance(0.1) and not more
    joined = isinstance(model, Mirrored)
    return Case(model, image, None if own else example, per_image, more, more_of_example, joined)
