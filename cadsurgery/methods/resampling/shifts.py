"""The small network of the learned sampler: inverted residuals, and a head with a global branch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cadsurgery.support.errors import InvalidInput

_HEAD = 256
# Channels, blocks, stride of the first block (Sandler et al., CVPR 2018, Table 2). All stages but the first expand
# sixfold.
_STAGES = ((16, 1, 1), (24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
_STEM, _EXPANSION = 32, 6


def _norm(
    channels: int, out: int, kernel: int = 1, relu: type[nn.Module] | None = nn.ReLU6, **options: Any
) -> nn.Sequential:
    padding = options.get("dilation", 1) * (kernel // 2)
    layers: list[nn.Module] = [nn.Conv2d(channels, out, kernel, padding=padding, bias=False, **options)]
    layers.append(nn.BatchNorm2d(out))
    return nn.Sequential(*layers, *([relu()] if relu else []))


class _InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and projection, with a residual connection if the shape stays."""

    def __init__(self, channels: int, inner: int, out: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.adds = stride == 1 and channels == out
        layers = [_norm(channels, inner)] if inner != channels else []
        layers.append(_norm(inner, inner, 3, stride=stride, dilation=dilation, groups=inner))
        self.layers = nn.Sequential(*layers, _norm(inner, out, relu=None))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, out, h', w')."""
        return x + self.layers(x) if self.adds else self.layers(x)


def _blocks(width: float, output_stride: int) -> Iterator[_InvertedResidual]:
    """Yield the blocks; after the output stride is reached, strides become dilations, as published."""
    channels, stride, dilation = int(_STEM * width), 2, 1
    for place, (number, count, first) in enumerate(_STAGES):
        out = int(number * width)
        for step in (first, *[1] * (count - 1)):
            inner = (channels * _EXPANSION + 4) // 8 * 8 if place else channels
            is_reached = step > 1 and stride == output_stride
            yield _InvertedResidual(channels, inner, out, 1 if is_reached else step, dilation)
            stride, dilation = (stride, dilation * step) if is_reached else (stride * step, dilation)
            channels = out


class ShiftNet(nn.Module):
    """MobileNetV2 at some output stride; a head joins its features with their mean over the image.

    The defaults are the published sampler: 64 x 64 pixels in, offsets of 8 x 8 locations out.
    """

    def __init__(
        self, channels: int = 3, outputs: int = 2, width: float = 0.25, output_stride: int = 8
    ) -> None:
        """Create the network.

        Args:
            channels: channels of the image.
            outputs: number of outputs per position.
            width: factor of the numbers of channels.
            output_stride: image pixels per position.
        """
        super().__init__()
        stem, out = _norm(channels, int(_STEM * width), 3, stride=2), int(_STAGES[-1][0] * width)
        self.features = nn.Sequential(stem, *_blocks(width, output_stride))
        self.local = _norm(out, _HEAD, relu=nn.ReLU)
        projection = _norm(out, _HEAD, relu=nn.ReLU)
        self.whole = nn.Sequential(nn.AdaptiveAvgPool2d(1), projection)
        self.joined = _norm(2 * _HEAD, _HEAD, relu=nn.ReLU)
        self.last = nn.Conv2d(_HEAD, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map an image (B, channels, H, W) to (B, outputs, h, w).

        Raises:
            InvalidInput: a batch of one in training, for which batch norm of the global mean is undefined.
        """
        norms = (module for module in self.whole.modules() if isinstance(module, nn.BatchNorm2d))
        if x.shape[0] == 1 and any(norm.training for norm in norms):
            raise InvalidInput(
                "the learned sampler cannot be trained on one image at a time.",
                why="one of its batch norms sees a single value per channel.",
                next='set batch to 2 or more, or batch_norm="frozen".',
            )
        y = self.features(x)
        local = self.local(y)
        return self.last(self.joined(torch.cat((local, self.whole(y).expand_as(local)), 1)))

    def fold(self) -> None:
        """Fold batch norms into the preceding convolutions, in place; the network must be in evaluation mode."""
        for module in self.modules():
            if (
                isinstance(module, nn.Sequential)
                and len(module) > 1
                and isinstance(module[1], nn.BatchNorm2d)
            ):
                conv = module[0]
                assert isinstance(conv, nn.Conv2d)
                module[0], module[1] = fuse_conv_bn_eval(conv, module[1]), nn.Identity()
