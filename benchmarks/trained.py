"""The trained segmentation networks that the recipes name, each with labelled pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import cadsurgery as cs
from recipes.camvid_mobilenetv2 import network as camvid
from recipes.espnet_camvid import network as espnet
from recipes.voc_deeplab import network as voc

IGNORED = 255


def padded(data: cs.SegmentationData) -> cs.SegmentationData:
    """Return VOC's pictures as the network was trained on them: scaled to 513 pixels and padded, labels likewise."""

    def read(position: int) -> tuple[Tensor, Any]:
        image, labels = data[position]
        whole, (height, width) = voc.padded(image)
        small = F.interpolate(labels[None, None].double(), (height, width), mode="nearest")[0, 0]
        right, below = voc.SIDE - width, voc.SIDE - height
        return whole, F.pad(small, (0, right, 0, below), value=IGNORED).byte().numpy()

    return replace(data, read=read)


def spread(data: cs.SegmentationData, count: int) -> cs.SegmentationData:
    """Return so many pictures of data, evenly spread."""
    places = [at * len(data) // min(count, len(data)) for at in range(min(count, len(data)))]
    return data.at(places)


# From the folder with data and weights; the number is the output stride.
NETWORKS: dict[str, Callable[[Path], tuple[nn.Module, cs.SegmentationData]]] = {
    "camvid-8": lambda data: (camvid.build(data), camvid.images(data, "test")),
    "espnet-8": lambda data: (espnet.build(data), espnet.images(data, "test")),
    "voc-8": lambda data: (voc.build(data, 8), padded(voc.images(data))),
    "voc-16": lambda data: (voc.build(data, 16), padded(voc.images(data))),
}
