"""DeepLabv3 (mobile variant) on MobileNetV2 for the 21 VOC classes: network, weights, and images."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

import cadsurgery as cs
from cadsurgery.data.images import read_image
from cadsurgery.data.sources import VOC_CLASSES

SIDE = 513  # side in pixels of the square to which an image is scaled and padded
# MobileNetV2's groups of blocks: expansion, channels, blocks, stride of the first block.
GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
HIDDEN = 256  # channels of the head


def _unit(
    inputs: int, outputs: int, kernel: int = 1, activation: type[nn.Module] | None = nn.ReLU6, **options: int
) -> Conv2dNormActivation:
    """Build a convolution with bias (batch norm is folded into it) and an activation."""
    return Conv2dNormActivation(
        inputs, outputs, kernel, norm_layer=None, activation_layer=activation, bias=True, **options
    )


class Block(nn.Module):
    """Convolutions in sequence, with a residual connection if `residual`."""

    def __init__(self, *units: nn.Module, residual: bool = False) -> None:
        super().__init__()
        self.conv, self.residual = nn.Sequential(*units), residual

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to (B, C, h, w)."""
        return x + self.conv(x) if self.residual else self.conv(x)


def _features(output_stride: int) -> nn.Sequential:
    """Build MobileNetV2 up to its last block.

    A stride beyond the output stride becomes 1, with twice the dilation from the next 3x3 convolution on.
    """
    blocks: list[nn.Module] = [Block(_unit(3, 32, 3, stride=2))]
    channels, reached, dilation = 32, 2, 1
    for widening, outputs, count, first in GROUPS:
        for place in range(count):
            step, wide = first if place == 0 else 1, channels * widening
            stride = step if reached * step <= output_stride else 1
            depthwise = _unit(wide, wide, 3, stride=stride, dilation=dilation, groups=wide)
            widen = [_unit(channels, wide)] if widening > 1 else []
            units = (*widen, depthwise, _unit(wide, outputs, activation=None))
            blocks.append(Block(*units, residual=step == 1 and channels == outputs))
            reached, dilation, channels = reached * stride, dilation * step // stride, outputs
    return nn.Sequential(*blocks)


class DeepLab(nn.Module):
    """Class scores at the size of the image."""

    def __init__(self, output_stride: int = 8) -> None:
        """Build the network with random weights; trained at output stride 16, it is about as accurate at 8 and 32."""
        super().__init__()
        channels = GROUPS[-1][1]
        self.features = _features(output_stride)
        self.aspp0 = _unit(channels, HIDDEN, activation=nn.ReLU)
        self.image_pooling = _unit(channels, HIDDEN, activation=nn.ReLU)
        self.project = _unit(2 * HIDDEN, HIDDEN, activation=nn.ReLU)
        self.classifier = nn.Conv2d(HIDDEN, len(VOC_CLASSES), 1)
        self.pooling = nn.AdaptiveAvgPool2d(1)
        self.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}  # images are x / 127.5 - 1

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to class scores (B, 21, H, W)."""
        size = x.shape[-2:]
        x = self.features(x)
        pooled = self.image_pooling(self.pooling(x))
        pooled = F.interpolate(pooled, size=x.shape[-2:], mode="nearest")
        x = self.classifier(self.project(torch.cat([pooled, self.aspp0(x)], 1)))
        return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def build(data: Path, output_stride: int = 8) -> DeepLab:
    """Build the network with the given weights.

    Args:
        data: folder with `voc_deeplab/`.
        output_stride: 8, 16 (as it was trained) or 32.
    """
    model = DeepLab(output_stride)
    model.load_state_dict(load_file(data / "voc_deeplab" / "deeplabv3_mobilenetv2_voc.safetensors"))
    return model.eval()


def images(data: Path) -> cs.SegmentationData:
    """Return the labelled images, unscaled."""
    return cs.open_data(f"folder:{data / 'voc_deeplab'},classes={'/'.join(VOC_CLASSES)}", "test")


def unlabelled(data: Path) -> list[Path]:
    """Return photos without labels, for training."""
    return sorted((data / "voc_deeplab" / "unlabelled").glob("*.jpg"))


def padded(picture: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Scale the long side of an image (3, H, W) in 0..1 to 513 pixels and pad it with mean grey to a square.

    As in training of the weights, padding is to the right and below. Returns the image before normalisation, and the
    (height, width) without padding.
    """
    longest = max(picture.shape[1:])
    height, width = (round(side * SIDE / longest) for side in picture.shape[1:])
    pixels = (255 * picture[None]).round().byte()  # as in the evaluation published with the weights
    scaled = F.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True)[0] / 255
    return F.pad(scaled, (0, SIDE - width, 0, SIDE - height), value=0.5), (height, width)


def read(path: Path) -> Tensor:
    """Read an image file as (3, 513, 513), see `padded`."""
    return padded(read_image(path))[0]


def restored(scores: Tensor, inside: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Crop and resize class scores (B, C, 513, 513) of a padded image to (B, C, *size) of the original image."""
    height, width = inside
    return F.interpolate(scores[..., :height, :width], size=size, mode="bilinear", align_corners=False)
