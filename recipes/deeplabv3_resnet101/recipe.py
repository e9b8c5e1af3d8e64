"""DeepLabv3-ResNet on Cityscapes as published (Hesse et al., CVPRW 2023): networks and settings.

    python recipes/deeplabv3_resnet101/recipe.py CHECKPOINTS [--output FOLDER]

converts the published checkpoints found in the folder CHECKPOINTS; see `checkpoints.py` and the README.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.segmentation.deeplabv3 import ASPP, DeepLabHead, DeepLabV3

import cadsurgery as cs
from cadsurgery.data.networks import IMAGENET_MEAN, IMAGENET_STD

CLASSES = 19
RESNET50, RESNET101, RESNET152 = (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)
NAMES = {RESNET50: "resnet50", RESNET101: "resnet101", RESNET152: "resnet152"}
# Dilation rates of the head's 3x3 convolutions, by the output stride of the map it reads.
RATES = {8: (12, 24, 36), 16: (6, 12, 18), 32: (3, 6, 9)}
# Options of adaptive networks as published: legal level maps, interpolation, counts in batch norm.
PUBLISHED: dict[str, Any] = {
    "region": "backbone",
    "anchor": "center",
    "fill": "nearest",
    "patch": "block",
    "statistics": "element",
}
LEARNED = {**PUBLISHED, "patch": "quadtree"}  # its maps are already uniform on 2 x 2 fine pixels


@dataclass(frozen=True)
class Run:
    """A published run.

    Attributes:
        output_stride: output stride of the network in training; the high one if it is adaptive.
        low: low output stride, or None for a dense network.
        mask: mask of the adaptive network.
        options: options of `adaptify`.
        miou: published mean IoU on Cityscapes val, or None. Do not compare across sources: the first four are from
            the README (30k steps), the oracle's is from Tab. 2 of the supplementary (30k + 10k).
        stem: name of the published file without suffix, or "" if none was released.
    """

    output_stride: int
    low: int | None = None
    mask: str = ""
    options: dict[str, Any] | None = None
    miou: float | None = None
    stem: str = ""


def _edges(threshold: float, low: int, miou: float | None = None, stem: str = "") -> Run:
    return Run(8, low, f"edges:threshold={threshold},dilation=11", PUBLISHED, miou, stem)


_STEM = "best_deeplabv3_{}resnet101_cityscapes_"
RUNS = {
    "os16": Run(16, miou=0.762, stem=_STEM.format("") + "os16_seed1"),
    "os8": Run(8, miou=0.776, stem=_STEM.format("") + "os8_seed1"),
    "edges-8-16-0.15": _edges(
        0.15,
        16,
        0.773,
        _STEM.format("batch_ap_") + "os8_modeedges_os16till8_seed2_trimapwidth11_threshold0.15",
    ),
    "edges-8-16-0.35": _edges(0.35, 16),
    "edges-8-16-0.95": _edges(0.95, 16),
    "edges-8-32-0.15": _edges(0.15, 32),
    "edges-8-32-0.35": _edges(0.35, 32),
    "edges-8-32-0.95": _edges(0.95, 32),
    # gamma is the fraction downsampled, `fraction` the fraction kept high; their sum is 1
    "learned-0.5": Run(
        8,
        16,
        "learned:fraction=0.5",
        LEARNED,
        0.775,
        _STEM.format("ad_")
        + "modeend2end_seed0_default_tau1.0_lowresactive0.5_w_downsample_shared_andbatchnorm_shared",
    ),
    "learned-0.7": Run(8, 16, "learned:fraction=0.3", LEARNED),
    "trimap-8-32": Run(8, 32, "trimap:width=33", PUBLISHED, 0.7748),
}


def backbone(
    layers: Sequence[int],
    output_stride: int,
    width: int = 64,
    imagenet: bool = False,
    returned: dict[str, str] | None = None,
) -> IntermediateLayerGetter:
    """Build a ResNet of bottleneck blocks without classifier, dilated to an output stride.

    Args:
        layers: number of blocks of each of the four stages, e.g. `RESNET101`.
        output_stride: 8, 16 or 32 input pixels per sample of its last map.
        width: channels of the first stage's 3x3 convolutions; 64 except in tests.
        imagenet: use torchvision's first ImageNet weights, as published.
        returned: stages to return, with their names in the output; default: the last as "out".

    Raises:
        InvalidInput: another output stride, or ImageNet weights for a network that has none.
        FileError: the ImageNet weights are neither cached nor reachable.
    """
    if output_stride not in RATES:
        raise cs.InvalidInput(f"output_stride={output_stride} is not possible.", next="use 8, 16 or 32.")
    dilated = [False, output_stride <= 8, output_stride <= 16]
    net = ResNet(Bottleneck, list(layers), width_per_group=width, replace_stride_with_dilation=dilated)
    if imagenet:
        name = NAMES.get(tuple(layers)) if width == 64 else None
        if name is None:
            raise cs.InvalidInput(
                f"there are no ImageNet weights for {list(layers)} blocks of width {width}.",
                next=f"use layers of {', '.join(NAMES.values())}, or imagenet=False.",
            )
        net.load_state_dict(cs.build_model(f"torchvision:{name}", "IMAGENET1K_V1").state_dict())
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.01
    return IntermediateLayerGetter(net, returned or {"layer4": "out"})


def initialised(head: nn.Module) -> nn.Module:
    """Initialise a head as published, with dropout 0.1 in its pyramid pooling."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, ASPP):
            module.project[3].p = 0.1
    return head


def deeplabv3(
    layers: Sequence[int] = RESNET101,
    output_stride: int = 8,
    num_classes: int = CLASSES,
    width: int = 64,
    imagenet: bool = False,
) -> DeepLabV3:
    """Build DeepLabv3 from torchvision's parts at an output stride; arguments as for `backbone`.

    The head's rates depend on the output stride. Maps (B, 3, H, W) to `{"out": logits}` at the image's resolution.
    """
    trunk = backbone(layers, output_stride, width, imagenet)
    return DeepLabV3(trunk, initialised(DeepLabHead(2048, num_classes, RATES[output_stride])))


# For the command line, which takes functions without arguments: module:NAME.
os8, os16, os32 = (partial(deeplabv3, output_stride=stride) for stride in RATES)
resnet50_os8, resnet50_os16, resnet50_os32 = (partial(deeplabv3, RESNET50, stride) for stride in RATES)
resnet152_os8, resnet152_os16, resnet152_os32 = (partial(deeplabv3, RESNET152, stride) for stride in RATES)


def adapted(model: nn.Module, run: Run, mask: object = None, **options: Any) -> nn.Module:
    """Prepare a network for a published run: adaptive, or unchanged for a dense run.

    Args:
        model: network at the run's output stride.
        run: an entry of `RUNS`.
        mask: mask to use instead of the run's.
        options: options of `adaptify` that override the run's.
    """
    if run.low is None:
        return model
    strides = (run.output_stride, run.low)
    chosen = run.mask if mask is None else mask
    stated = {
        "normalisation": (IMAGENET_MEAN, IMAGENET_STD)
    }  # normalisation assumed by the published thresholds
    return cs.adaptify(model, chosen, output_stride=strides, **{**stated, **(run.options or {}), **options})


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from recipes.deeplabv3_resnet101.checkpoints import main

    main()
