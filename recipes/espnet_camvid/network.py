"""ESPNet (arXiv 1803.06815), written from the paper for the published CamVid weights; data as camvid_mobilenetv2."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recipes.camvid_mobilenetv2 import network as camvid

OUTPUTS = 12  # the classes of CamVid, and one for what has no class
DILATIONS = (1, 2, 4, 8, 16)
images = camvid.images


class Activation(nn.Module):
    """Batch normalisation and a PReLU of each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        return self.act(self.bn(x))


class Convolution(nn.Module):
    """A convolution without bias that keeps the size, up to its stride."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel - 1) // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map of the convolution."""
        return self.conv(x)


class Activated(Convolution):
    """A convolution with batch normalisation and PReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)
        self.act = nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation."""
        return self.act(self.bn(self.conv(x)))


class Pyramid(nn.Module):
    """Reduce the channels, and convolve with five dilations, whose results are summed one after the other (Fig. 1)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        width = outputs // len(DILATIONS)
        self.c1 = Convolution(inputs, width, 3 if stride > 1 else 1, stride)
        for dilation in DILATIONS:
            first = outputs - width * (len(DILATIONS) - 1) if dilation == 1 else width
            self.add_module(f"d{dilation}", Convolution(width, first, 3, dilation=dilation))

    def sums(self, x: Tensor) -> Tensor:
        """Return the concatenated sums."""
        reduced = self.c1(x)
        parts = [self.d1(reduced), self.d2(reduced)]
        for branch in (self.d4, self.d8, self.d16):
            parts.append(parts[-1] + branch(reduced))
        return torch.cat(parts, 1)


class Downsampling(Pyramid):
    """Halve the resolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, stride=2)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)
        self.act = nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of half the resolution."""
        return self.act(self.bn(self.sums(x)))


class Block(Pyramid):
    """Keep the resolution; with as many outputs as inputs the input is added."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.adds = inputs == outputs
        self.bn = Activation(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same resolution."""
        found = self.sums(x)
        return self.bn(x + found if self.adds else found)


class Encoder(nn.Module):
    """Output stride 8 in three levels; the image itself, averaged, enters the first two."""

    def __init__(self, second: int = 2, third: int = 8) -> None:
        super().__init__()
        self.halve = nn.AvgPool2d(3, 2, 1)
        self.level1, self.b1 = Activated(3, 16, 3, 2), Activation(19)
        self.level2_0 = Downsampling(19, 64)
        self.level2 = nn.Sequential(*(Block(64, 64) for _ in range(second)))
        self.b2 = Activation(131)
        self.level3_0 = Downsampling(131, 128)
        self.level3 = nn.Sequential(*(Block(128, 128) for _ in range(third)))
        self.b3 = Activation(256)
        self.classifier = Convolution(256, OUTPUTS, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return maps of 1/2 and 1/4 of the resolution, and scores of 1/8."""
        half = self.halve(x)
        first = self.b1(torch.cat([self.level1(x), half], 1))
        start = self.level2_0(first)
        second = self.b2(torch.cat([self.level2(start), start, self.halve(half)], 1))
        start = self.level3_0(second)
        return first, second, self.classifier(self.b3(torch.cat([start, self.level3(start)], 1)))


class ESPNet(nn.Module):
    """ESPNet with two and eight blocks, from RGB of 0..1 that is normalised as `pretrained_cfg` says."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.br = nn.BatchNorm2d(OUTPUTS, eps=1e-3)
        self.up_l3 = nn.Sequential(nn.ConvTranspose2d(OUTPUTS, OUTPUTS, 2, 2, bias=False))
        self.level3_C = Convolution(131, OUTPUTS, 1)
        self.combine_l2_l3 = nn.Sequential(Activation(2 * OUTPUTS), Block(2 * OUTPUTS, OUTPUTS))
        upsampling = nn.ConvTranspose2d(OUTPUTS, OUTPUTS, 2, 2, bias=False)
        self.up_l2 = nn.Sequential(upsampling, Activation(OUTPUTS))
        self.conv = Activated(19 + OUTPUTS, OUTPUTS, 3)
        self.classifier = nn.ConvTranspose2d(OUTPUTS, OUTPUTS, 2, 2, bias=False)
        mean, std = (110.331, 108.409, 105.033), (72.126, 72.691, 69.904)  # of BGR in 0..255
        self.pretrained_cfg = {
            "mean": tuple(value / 255 for value in mean[::-1]),
            "std": std[::-1],
        }

    def forward(self, x: Tensor) -> Tensor:
        """Return scores at the image's resolution."""
        first, second, scores = self.encoder(x.flip(1))
        coarse = self.up_l3(self.br(scores))
        middle = self.up_l2(self.combine_l2_l3(torch.cat([self.level3_C(second), coarse], 1)))
        return self.classifier(self.conv(torch.cat([middle, first], 1)))


def build(data: Path) -> ESPNet:
    """Build the network with the published weights."""
    model = ESPNet()
    model.load_state_dict(load_file(data / "espnet_camvid" / "espnet_p2_q8_camvid.safetensors"))
    return model.eval()
