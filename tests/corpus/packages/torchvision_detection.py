"""torchvision: detectors, converted through their backbone, and its networks for segmentation and flow."""

from __future__ import annotations

from torch import nn
from torchvision.models import detection, segmentation

from benchmarks.zoo.corpus import network

DETECTORS = (
    *("fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn", "maskrcnn_resnet50_fpn"),
    *("keypointrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "fcos_resnet50_fpn"),
    *("ssd300_vgg16", "ssdlite320_mobilenet_v3_large"),
)
SEGMENTATION = (
    "fcn_resnet50",
    "deeplabv3_resnet50",
    "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
)


def declare(module, name: str) -> None:
    """One of them, with random weights."""

    @network(name=name)
    def build() -> nn.Module:
        return getattr(module, name)(weights=None, weights_backbone=None)


for name in DETECTORS:
    declare(detection, name)
for name in SEGMENTATION:
    declare(segmentation, name)
