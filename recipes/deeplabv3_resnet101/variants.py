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

torch.fx.wrap("deform_conv2d")  # one node of the graph: its Python looks at shapes


def fcn(
    layers: Sequence[int] = RESNET101, output_stride: int = 8, num_classes: int = CLASSES, **options: Any
) -> FCN:
    """ResNet with the FCN head: 3x3 to a quarter of the channels, dropout 0.1, 1x1; as published.

    Args:
        layers: see `recipe.backbone`.
        output_stride: see `recipe.backbone`.
        num_classes: of the labels.
        options: of `recipe.backbone`.
    """
    trunk = backbone(layers, output_stride, **options)
    return FCN(trunk, initialised(FCNHead(2048, num_classes)))


class DeepLabV3Plus(nn.Module):
    """DeepLabv3+ of torchvision's parts (Chen et al., ECCV 2018): the pyramid pooling's map is resized to output
    stride 4 and joined with 48 channels made from the first stage."""

    def __init__(self, trunk: nn.Module, num_classes: int, rates: Sequence[int]) -> None:
        """Put the head on a backbone.

        Args:
            trunk: returns maps "low_level" (256 channels) and "out" (2048).
            num_classes: of the labels.
            rates: of the pyramid pooling.
        """
        super().__init__()
        self.backbone = trunk
        self.aspp = initialised(ASPP(2048, rates))
        self.project = initialised(_unit(256, 48, 1))
        self.classifier = initialised(nn.Sequential(*_unit(304, 256, 3), nn.Conv2d(256, num_classes, 1)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """`{"out": logits (B, classes, H, W)}` for images (B, 3, H, W)."""
        maps = self.backbone(x)
        low = self.project(maps["low_level"])
        high = F.interpolate(
            self.aspp(maps["out"]), size=low.shape[-2:], mode="bilinear", align_corners=False
        )
        scores = self.classifier(torch.cat([low, high], dim=1))
        return {"out": F.interpolate(scores, size=x.shape[-2:], mode="bilinear", align_corners=False)}


def _unit(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Convolution, batch norm and ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def deeplabv3plus(
    layers: Sequence[int] = RESNET101, output_stride: int = 8, num_classes: int = CLASSES, **options: Any
) -> DeepLabV3Plus:
    """ResNet with the DeepLabv3+ head; arguments as for `fcn`."""
    returned = {"layer1": "low_level", "layer4": "out"}
    trunk = backbone(layers, output_stride, returned=returned, **options)
    return DeepLabV3Plus(trunk, num_classes, RATES[output_stride])


class DeformableConv(nn.Module):
    """A convolution whose taps move by offsets that one bias-free 3x3 computes from the same input (Dai et al., ICCV
    2017). At first all offsets are zero: the convolution it was made from."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """Take over a convolution of stride 1.

        Args:
            conv: kernel k x k, square.
        """
        super().__init__()
        taps = conv.kernel_size[0] * conv.kernel_size[1]
        self.conv = conv
        self.offset = nn.Conv2d(
            conv.in_channels, 2 * taps, 3, padding=conv.dilation, dilation=conv.dilation, bias=False
        )
        nn.init.zeros_(self.offset.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C', h, w)."""
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
    """DeepLabv3 whose last block's 3x3 is deformable; arguments as for `fcn`.

    Converted, this 3x3 is a barrier: where a tap looks is computed, so no kernel map can hold it. It runs on the dense
    fine map, with offsets computed on elements; of its result the cells' top-left values go on.
    """
    model = deeplabv3(layers, output_stride, num_classes, **options)
    block = model.backbone["layer4"][-1]
    block.conv2 = DeformableConv(block.conv2)
    return model


class SoftPool(nn.Module):
    """Average over 2 x 2 samples weighed by their exponentials (Stergiou et al., ICCV 2021).

    Values above 20 weigh as 20 do, so that no sum overflows in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, h // 2, w // 2)."""
        weight = torch.exp(torch.clamp(x, -20.0, 20.0))
        return F.avg_pool2d(x * weight, 2) / F.avg_pool2d(weight, 2)


def softpool(layers: Sequence[int] = RESNET101, num_classes: int = CLASSES, **options: Any) -> DeepLabV3:
    """DeepLabv3 that downsamples in its last two stages by SoftPool instead of strides; arguments as for `fcn`.

    It is written at its own output stride of 32: a pooling, unlike a stride, leaves no dilation behind. Convert it
    with `region="auto"` to (8, 32) or (16, 32): then the head works on elements too and keeps its reach in pixels,
    rates 3, 6, 9 at 32 being 12, 24, 36 at 8. A dense head after the backbone would get the map at stride 32 only.
    """
    model = deeplabv3(layers, 32, num_classes, **options)
    for stage in ("layer3", "layer4"):
        block = model.backbone[stage][0]
        block.conv2.stride = block.downsample[0].stride = (1, 1)
        block.conv2 = nn.Sequential(block.conv2, SoftPool())
        block.downsample[0] = nn.Sequential(SoftPool(), block.downsample[0])
    return model
