"""ALIKE (Zhao et al., arXiv 2112.02906): dense keypoint scores and descriptors, as a user's own network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

# Channels of the four blocks, and of the descriptors.
CHANNELS = {"alike-t": (8, 16, 32, 64, 64), "alike-n": (16, 32, 64, 128, 128)}
STRIDE = 32  # sides of input images are multiples of it
STRIDES = (2, 2)  # strides of `coarsen`, for output strides 1 to 4
REGION = ("coarsen", "cat", "convhead2", "read")  # `coarsen` and the modules after it


class Stem(nn.Module):
    """Two 3 x 3 convolutions at full resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, C, H, W)."""
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(image))))))


class Read(nn.Module):
    """Splits the last map into scores and descriptors."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the last channel as scores, the others as descriptors."""
        return {"scores": torch.sigmoid(x[:, -1:]), "descriptors": F.normalize(x[:, :-1], dim=1)}


class Alike(nn.Module):
    """Four blocks at output strides 1, 2, 8 and 32, upsampled to full resolution, and a 1 x 1 convolution."""

    def __init__(self, channels: tuple[int, int, int, int, int], strides: Sequence[int] = ()) -> None:
        """Build the network with random weights.

        Args:
            channels: see `CHANNELS`.
            strides: strides of 1 x 1 pools before the last convolution; the published network has none. With
                strides, the last convolution is downsampled, so `cadsurgery.adaptify` has strides to remove; with
                everything high the result is the published network.
        """
        super().__init__()
        c1, c2, c3, c4, dim = channels
        self.block1 = Stem(c1)
        self.pool2 = nn.MaxPool2d(2)
        self.block2 = _block(c1, c2)
        self.pool3 = nn.MaxPool2d(4)
        self.block3 = _block(c2, c3)
        self.pool4 = nn.MaxPool2d(4)
        self.block4 = _block(c3, c4)
        self.conv1, self.conv2, self.conv3, self.conv4 = (
            nn.Conv2d(count, dim // 4, 1, bias=False) for count in (c1, c2, c3, c4)
        )
        self.coarsen = nn.Sequential(*(nn.MaxPool2d(1, stride) for stride in strides))
        self.convhead2 = nn.Conv2d(dim, dim + 1, 1, bias=False)
        self.read = Read()

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return scores (B, 1, H, W) and normalised descriptors (B, D, H, W) of images (B, 3, H, W) in 0..1."""
        x1 = self.block1(image)
        x2 = self.block2(self.pool2(x1))
        x3 = self.block3(self.pool3(x2))
        x4 = self.block4(self.pool4(x3))
        parts = (
            F.relu(self.conv1(x1)),
            _upsampled(F.relu(self.conv2(x2)), 2),
            _upsampled(F.relu(self.conv3(x3)), 8),
            _upsampled(F.relu(self.conv4(x4)), 32),
        )
        x = torch.cat([self.coarsen(part) for part in parts], 1)
        return self.read(self.convhead2(x))


def build(data: Path, name: str = "alike-n", strides: Sequence[int] = ()) -> Alike:
    """Build a network with its weights.

    Args:
        data: folder with `alike/`.
        name: `alike-t` or `alike-n`.
        strides: see `Alike`.
    """
    net = Alike(CHANNELS[name], strides)
    net.load_state_dict(load_file(data / "alike" / f"{name}.safetensors"))
    return net.eval()


def padded(image: Tensor) -> Tensor:
    """Pad an image (..., H, W) with zeros on the right and at the bottom to multiples of 32."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % STRIDE, 0, -height % STRIDE))


def _block(inputs: int, outputs: int) -> BasicBlock:
    """Build torchvision's residual block with a shortcut convolution that has a bias and no batch norm."""
    return BasicBlock(inputs, outputs, downsample=nn.Conv2d(inputs, outputs, 1))


def _upsampled(x: Tensor, scale: int) -> Tensor:
    return F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=True)
