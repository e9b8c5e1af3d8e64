"""segmentation-models-pytorch: every decoder on encoders of several families."""

from __future__ import annotations

from itertools import product

import segmentation_models_pytorch as smp
from torch import nn

from benchmarks.zoo.corpus import network

DECODERS = (
    *("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "UPerNet", "Segformer"),
    *("DeepLabV3", "DeepLabV3Plus"),
)
ENCODERS = (
    *("resnet34", "efficientnet-b0", "mobilenet_v2", "resnext50_32x4d"),
    *("tu-resnet18d", "tu-mobilenetv3_large_100", "tu-convnext_atto", "tu-regnety_002"),
)


def declare(decoder: str, encoder: str) -> None:
    """One of them, with random weights."""

    @network(name=f"{decoder}-{encoder}")
    def build() -> nn.Module:
        return getattr(smp, decoder)(encoder, encoder_weights=None, classes=5)


for names in product(DECODERS, ENCODERS):
    declare(*names)
