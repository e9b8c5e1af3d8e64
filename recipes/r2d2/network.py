"""R2D2 (Revaud et al., NeurIPS 2019): repeatability, reliability and a descriptor of every pixel."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BUILDER, PUBLISHED = "recipes.r2d2.network:r2d2", "recipes.r2d2.network:published"
# Width of the image's margin in which aligned padding reads other zeros than the published padding.
FRAME = 20


class Layer(NamedTuple):
    """A convolution of `ops`, and the layers after it.

    Attributes:
        side: side of the kernel.
        channels: number of output channels.
        dilation: dilation; doubled after each layer whose stride of 2 was removed.
        padding: before and after, on both axes; as published half of dilation (side - 1) each.
        norm, relu: followed by batch norm, and this by ReLU.
    """

    side: int
    channels: int
    dilation: int
    padding: tuple[int, int]
    norm: bool = True
    relu: bool = True

    @property
    def published(self) -> Layer:
        """Return the layer with the published padding."""
        half = self.dilation * (self.side - 1) // 2
        return self._replace(padding=(half, half))


# As published, the 2 x 2 kernels read half a step before and after a pixel, i.e. inside the cells of the strided
# network. Here the taps of every layer lie at multiples of its cells, with the same sums: `ops.12` shifts its map by 2
# pixels, `ops.18` by 2 more, and `ops.20` shifts it back by 4.
LAYERS = (
    Layer(3, 32, 1, (1, 1)),
    Layer(3, 32, 1, (1, 1)),
    Layer(3, 64, 1, (1, 1)),
    Layer(3, 64, 2, (2, 2)),
    Layer(3, 128, 2, (0, 4)),
    Layer(3, 128, 4, (4, 4)),
    Layer(2, 128, 4, (0, 4), relu=False),
    Layer(2, 128, 8, (8, 0), relu=False),
    Layer(2, 128, 16, (8, 8), norm=False, relu=False),
)


class R2D2(nn.Module):
    """Nine convolutions with all strides removed, and two heads of one convolution each; parameters as released."""

    pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # noqa: RUF012

    def __init__(self, layers: tuple[Layer, ...] = LAYERS) -> None:
        """Build the network with random weights."""
        super().__init__()
        self.layers, channels = layers, 3
        ops: list[nn.Module] = []
        for layer in layers:
            even = layer.padding[0] if layer.padding[0] == layer.padding[1] else 0
            ops.append(nn.Conv2d(channels, layer.channels, layer.side, dilation=layer.dilation, padding=even))
            channels = layer.channels
            if layer.norm:
                ops.append(nn.BatchNorm2d(channels, affine=False))
            if layer.relu:
                ops.append(nn.ReLU())
        self.ops = nn.ModuleList(ops)
        self.clf = nn.Conv2d(channels, 2, 1)
        self.sal = nn.Conv2d(channels, 1, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Process images (B, 3, H, W), RGB normalised by ImageNet's mean and standard deviation.

        Returns:
            `descriptors` (B, 128, H, W) of unit length; `maps` (B, 2, H, W), reliability and repeatability in 0..1;
            and `scores` (B, 1, H, W), their product.
        """
        x, layers = image, iter(self.layers)
        for op in self.ops:
            if isinstance(op, nn.Conv2d):
                before, after = next(layers).padding
                x = x if before == after else F.pad(x, (before, after, before, after))
            x = op(x)
        squared = x.square()
        reliability = self.clf(squared).softmax(1)[:, 1:2]
        strength = F.softplus(self.sal(squared))
        repeatability = strength / (1 + strength)
        maps = torch.cat((reliability, repeatability), 1)
        return {"descriptors": F.normalize(x, dim=1), "maps": maps, "scores": reliability * repeatability}


def r2d2() -> R2D2:
    """Build the network with random weights and aligned padding; `FRAME` pixels differ from the published one."""
    return R2D2()


def published() -> R2D2:
    """Build the network with random weights and the published padding."""
    return R2D2(tuple(layer.published for layer in LAYERS))
