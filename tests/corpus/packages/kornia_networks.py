"""kornia: its convolutional networks for images."""

from __future__ import annotations

import kornia
import kornia.feature
from torch import nn

from benchmarks.zoo.corpus import network


@network(name="DISK")
def disk() -> nn.Module:
    """Keypoints by a U-Net: heat map and descriptors."""
    return kornia.feature.DISK().unet


@network(name="DexiNed")
def dexined() -> nn.Module:
    """Edges: transposed side outputs."""
    from kornia.models.dexined import DexiNed

    return DexiNed(pretrained=False)


@network(name="SOLD2")
def sold2() -> nn.Module:
    """Lines: a stacked hourglass, junctions, heat maps, descriptors."""
    return kornia.feature.SOLD2_detector(pretrained=False).model


@network(name="XFeat")
def xfeat() -> nn.Module:
    """Keypoints at several scales."""
    return kornia.feature.XFeat().net


@network(name="ALIKED")
def aliked() -> nn.Module:
    """Keypoints by blocks with deformable convolutions."""
    return kornia.feature.ALIKED()


@network(name="SmallSRNet")
def small_super_resolution() -> nn.Module:
    """Super-resolution by PixelShuffle, no stride."""
    from kornia.models.small_sr import SmallSRNet

    return SmallSRNet(upscale_factor=3, pretrained=False)


@network(name="RRDBNet")
def rrdb() -> nn.Module:
    """Super-resolution by dense residual blocks; at factor 2 the image is unshuffled first."""
    from kornia.models.rrdbnet import RRDBNet

    return RRDBNet(3, 3, num_feat=16, num_block=2, num_grow_ch=8)


@network(name="YuNet")
def yunet() -> nn.Module:
    """Faces: a pyramid of depthwise units."""
    from kornia.models.yunet.model import YuNet

    return YuNet("test", pretrained=False)
