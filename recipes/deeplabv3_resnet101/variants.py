"""Variants of the oracle table: other heads, a deformable last block, SoftPool instead of strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP, DeepLabV3
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torchvision.ops import deform_conv2d

from recipes.deeplabv3_resnet101.recipe import CLASSES, RATES, RESNET101, backbone, deeplabv3, initialised

torch.fx.wrap("deform_conv2d")  # one node of the graph, because its Python code reads shapes


def fcn(
    layers: Sequence[int] = RESNET101, output_stride: int = 8, num_classes: int = CLASSES, **options: Any
) -> FCN:
    """Build a ResNet with the FCN head: 3x3 to a quarter of the channels, dropout 0.1, 1x1; as published.

    Args:
        layers: see `recipe.backbone`.
        output_stride: see `recipe.backbone`.
        num_classes: number of classes.
        options: options of `recipe.backbone`.
    """
    trunk = backbone(layers, output_stride, **options)
    return FCN(trunk, initialised(FCNHead(2048, num_classes)))


class DeepLabV3Plus(nn.Module):
    """DeepLabv3+ from torchvision's parts (Chen et al., ECCV 2018).

    The map of the pyramid pooling is resized to output stride 4 and concatenated with 48 channels of the first stage.
    """

    def __init__(self, trunk: nn.Module, num_classes: int, rates: Sequence[int]) -> None:
        """Put the head on a backbone.

        Args:
            trunk: backbone that returns maps "low_level" (256 channels) and "out" (2048).
            num_classes: number of classes.
            rates: dilation rates of the pyramid pooling.
        """
        super().__init__()
        self.backbone = trunk
        self.aspp = initialised(ASPP(2048, rates))
        self.project = initialised(_unit(256, 48, 1))
        self.classifier = initialised(nn.Sequential(*_unit(304, 256, 3), nn.Conv2d(256, num_classes, 1)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images (B, 3, H, W) to `{"out": logits (B, classes, H, W)}`."""
        maps = self.backbone(x)
        low = self.project(maps["low_level"])
        high = F.interpolate(
            self.aspp(maps["out"]), size=low.shape[-2:], mode="bilinear", align_corners=False
        )
        scores = self.classifier(torch.cat([low, high], dim=1))
        return {"out": F.interpolate(scores, size=x.shape[-2:], mode="bilinear", align_corners=False)}


def _unit(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Build a convolution with batch norm and ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def deeplabv3plus(
    layers: Sequence[int] = RESNET101, output_stride: int = 8, num_classes: int = CLASSES, **options: Any
) -> DeepLabV3Plus:
    """Build a ResNet with the DeepLabv3+ head; arguments as for `fcn`."""
    returned = {"layer1": "low_level", "layer4": "out"}
    trunk = backbone(layers, output_stride, returned=returned, **options)
    return DeepLabV3Plus(trunk, num_classes, RATES[output_stride])


class DeformableConv(nn.Module):
    """A convolution with learned offsets of its taps (Dai et al., ICCV 2017).

    A bias-free 3x3 convolution computes the offsets from the same input. Initially they are zero, so the result is
    that of the original convolution.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        """Replace a convolution of stride 1.

        Args:
            conv: convolution with a square kernel.
        """
        super().__init__()
        taps = conv.kernel_size[0] * conv.kernel_size[1]
        self.conv = conv
        self.offset = nn.Conv2d(
            conv.in_channels, 2 * taps, 3, padding=conv.dilation, dilation=conv.dilation, bias=False
        )
        nn.init.zeros_(self.offset.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C', h, w)."""
        return deform_conv2d(
            x,
            self.offset(x),
            self.conv.weight,
            padding=self.conv.padding,
            dilation=self.conv.dilation,
        )


def deformable(
    layers: Sequence[int] = RESNET101, output_stride: int = 8, num_classes: int = CLASSES, **options: Any
) -> DeepLabV3:
    """Build DeepLabv3 with a deformable 3x3 in its last block; arguments as for `fcn`.

    In the converted network this 3x3 is a barrier: its tap positions are computed, so there is no kernel map. It
    runs on the dense fine map, with offsets computed on elements; the cells' top-left values of its result are used
    further on.
    """
    model = deeplabv3(layers, output_stride, num_classes, **options)
    block = model.backbone["layer4"][-1]
    block.conv2 = DeformableConv(block.conv2)
    return model


class SoftPool(nn.Module):
    """Average over 2 x 2 samples, weighted by their exponentials (Stergiou et al., ICCV 2021).

    Values above 20 get the weight of 20, so that no sum overflows in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, h // 2, w // 2)."""
        weight = torch.exp(torch.clamp(x, -20.0, 20.0))
        return F.avg_pool2d(x * weight, 2) / F.avg_pool2d(weight, 2)


def softpool(layers: Sequence[int] = RESNET101, num_classes: int = CLASSES, **options: Any) -> DeepLabV3:
    """Build DeepLabv3 with SoftPool instead of strides in its last two stages; arguments as for `fcn`.

    Its own output stride is 32: unlike a removed stride, pooling leaves no dilation. Convert it with `region="auto"`
    to (8, 32) or (16, 32): then the head runs on elements too and keeps its receptive field in pixels, since rates
    3, 6, 9 at 32 are 12, 24, 36 at 8. A dense head after the backbone would get the map at stride 32 only.
    """
    model = deeplabv3(layers, 32, num_classes, **options)
    for stage in ("layer3", "layer4"):
        block = model.backbone[stage][0]
        block.conv2.stride = block.downsample[0].stride = (1, 1)
        block.conv2 = nn.Sequential(block.conv2, SoftPool())
        block.downsample[0] = nn.Sequential(SoftPool(), block.downsample[0])
    return model
