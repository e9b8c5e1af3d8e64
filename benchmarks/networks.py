"""Networks that the bench and the recipes name as `module:function`."""

from __future__ import annotations

from torch import nn
from torchvision.models import vgg16


def vgg16_trunk() -> nn.Module:
    """VGG-16 up to conv4_3, as local features use it: output stride 8, or 1 without its three poolings."""
    return vgg16(weights=None).features[:23]
