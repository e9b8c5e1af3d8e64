"""Faster R-CNN on a sampled ResNet (Xie et al., ECCV 2020): backbones, checkpoints, cost, training.

    python recipes/sampling_faster_rcnn/recipe.py [FILE] [--backbone resnet101]

prints the published table of GFLOPs (multiply-accumulates / 1e9) of the backbone. With the FILE of a published
checkpoint, it loads the file and prints the network's name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import cadsurgery as cs

DEPTHS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
RESOLUTIONS = (500, 600, 800, 1000)  # shorter sides of the published table
UNIT = 1e9  # the publication's GFLOP
CONFIG = Path(__file__).parent / "config" / "r101.json"
_NAMES = {"weight": "mask.weight", "bias": "mask.bias", "width": "sigma", "temperature": "gumbel.cur_T"}
_OFFSETS = 18  # channels with the offsets of a deformable convolution's nine taps


class Stages(nn.Module):
    """A torchvision ResNet up to its last stage; it returns the maps of its four stages."""

    def __init__(self, name: str) -> None:
        super().__init__()
        whole = torchvision.models.get_model(name, weights=None)
        for child, module in whole.named_children():
            if child not in ("avgpool", "fc"):
                self.add_module(child, module)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return maps of strides 4, 8, 16 and 32."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        one = self.layer1(x)
        two = self.layer2(one)
        three = self.layer3(two)
        return one, two, three, self.layer4(three)


def backbone(name: Literal["resnet50", "resnet101"], noise: bool = False, grid: int = 11) -> cs.SampledModel:
    """Build the sampled backbone with random weights and open gates, in evaluation mode; it returns four maps.

    Args:
        name: name of the ResNet.
        noise: gates draw noise in evaluation, as published.
        grid: distance of the positions that are always computed.

    Raises:
        UnknownName: there is no such backbone.
    """
    cs.errors.check_name("backbone", name, DEPTHS)
    return cs.sample(Stages(name).eval(), grid=grid, noise=noise)


def published_names(net: cs.SampledModel) -> dict[str, str]:
    """Return the names of a backbone's state dict in the published code, by our names."""
    names = {}
    for name in net.state_dict():
        parts = name.split(".")
        if parts[0] != "sampling_gates":
            names[name] = name
            continue
        conv = net.program.gates[int(parts[1])].path
        names[name] = f"{conv}_{_NAMES[parts[2]]}"
    return names


def load_published(net: cs.SampledModel, state_dict: Mapping[str, Any]) -> cs.SampledModel:
    """Load the weights of a published file into the backbone, strictly.

    Args:
        net: the result of `backbone`.
        state_dict: state dict of the published code with bare keys; or a detector's file, whose entry `state_dict`
            has them with the prefix `backbone.`; other tensors are ignored.

    Raises:
        FileError: keys or shapes do not fit the network, or its convolutions are deformable.
    """
    values = dict(state_dict.get("state_dict", state_dict))
    if inside := {
        name.removeprefix("backbone."): v for name, v in values.items() if name.startswith("backbone.")
    }:
        values = inside
    if offsets := [name for name in values if ".conv2_offset." in name]:
        raise cs.FileError(
            "the file is of a backbone with deformable convolutions.",
            where=offsets[0],
            why="the positions they read are computed, and no kernel map of a window says which.",
            next="load a file of a backbone without them, whose keys have no conv2_offset.",
        )
    names, own = published_names(net), net.state_dict()
    expected = {theirs: ours for ours, theirs in names.items()}
    missing, foreign = expected.keys() - values.keys(), values.keys() - expected.keys()
    wrong = [
        name for name in expected.keys() & values.keys() if own[expected[name]].shape != values[name].shape
    ]
    if missing or foreign or wrong:
        where = [*(f"missing {n}" for n in sorted(missing)), *(f"unknown {n}" for n in sorted(foreign))]
        where += [f"{n}: {tuple(values[n].shape)} for {tuple(own[expected[n]].shape)}" for n in sorted(wrong)]
        raise cs.FileError(
            "the weights are not those of this backbone.",
            where="; ".join(where[:4]) + (f" and {len(where) - 4} more" if len(where) > 4 else ""),
            next="build the backbone of the file, resnet50 or resnet101.",
        )
    net.load_state_dict({expected[name]: value for name, value in values.items()})
    return net


# -- the detector --------------------------------------------------------------------------------------


class WithPyramid(nn.Module):
    """A backbone with a feature pyramid, in the form torchvision's detectors expect."""

    def __init__(self, body: nn.Module, channels: int = 256) -> None:
        super().__init__()
        self.body, self.out_channels = body, channels
        widths = [256 * 2**stage for stage in range(4)]
        self.fpn = FeaturePyramidNetwork(widths, channels, extra_blocks=LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the maps of the pyramid."""
        return self.fpn(OrderedDict((str(stage), value) for stage, value in enumerate(self.body(x))))


def detector(body: cs.SampledModel, classes: int = 91, **options: Any) -> FasterRCNN:
    """Build torchvision's Faster R-CNN on a backbone; images have the published size unless options change it.

    Args:
        body: the result of `backbone`.
        classes: number of classes including the background.
        options: options of torchvision's `FasterRCNN`.
    """
    longest, shortest = json.loads(CONFIG.read_text(encoding="utf-8"))["resize"]
    sizes = {"min_size": shortest, "max_size": longest}
    return FasterRCNN(WithPyramid(body), classes, **{**sizes, **options})


def set_training(net: FasterRCNN) -> FasterRCNN:
    """Set training mode as published: batch norms stay in evaluation mode, and the stem is not trained."""
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    for name in config["frozen"]:
        net.backbone.body.get_submodule(name).requires_grad_(False)
    return net


def make_optimizer(net: nn.Module) -> torch.optim.SGD:
    """Create SGD with the published settings for the trained parameters."""
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    return torch.optim.SGD(
        trained, config["lr"], momentum=config["momentum"], weight_decay=config["weight_decay"]
    )


def learning_rate(step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step as published: a linear warm-up, then a tenth after 8 and after 11 epochs."""
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    falls = sum(step // steps_per_epoch >= epoch for epoch in config["lr_epochs"])
    rate: float = config["lr"] * config["lr_factor"] ** falls
    if step < config["warmup_steps"]:
        first = config["warmup_from"]
        rate *= first + (1 - first) * step / config["warmup_steps"]
    return rate


def loss(
    net: FasterRCNN, pictures: list[Tensor], targets: list[dict[str, Tensor]], weight: float
) -> dict[str, Tensor]:
    """Return the losses of the detector, the weighted openness of its gates, and `loss`, the sum of all.

    Args:
        net: in training mode, see `set_training`.
        pictures, targets: as for torchvision's detectors.
        weight: weight of the sparse loss; published: .02, .05, .1, .2.
    """
    parts = dict(net(pictures, targets))
    parts["sparse"] = weight * net.backbone.body.sparse_loss()
    return {**parts, "loss": torch.stack(list(parts.values())).sum()}


# -- what it costs -------------------------------------------------------------------------------------


def gflops(
    name: Literal["resnet50", "resnet101"],
    resolution: int,
    densities: float | Sequence[tuple[float, float]] | None = None,
    offsets: bool = True,
) -> float:
    """Return the multiply-accumulates / 1e9 of a backbone by the published rule, on its fixed canvas.

    Args:
        name: name of the ResNet.
        resolution: shorter side; the canvas is this and 5/3 of it, both rounded down to a multiple of 32.
        densities: open shares of both gates, for each block or the same for all; None for no gates.
        offsets: count the offsets of deformable convolutions in stages 2 to 4, as published.
    """
    height, width = resolution // 32 * 32, int(5 * resolution / 3) // 32 * 32
    blocks = sum(DEPTHS[name])
    uniform = [(densities, densities)] * blocks if isinstance(densities, float | int) else densities
    of_blocks = iter(uniform if uniform is not None else [(1.0, 1.0)] * blocks)

    def pixels(stride: int) -> int:
        return (height // stride) * (width // stride)

    total, channels, stride = 49 * 3 * 64 * pixels(2), 64, 4
    for stage, count in enumerate(DEPTHS[name]):
        planes = 64 * 2**stage
        for block in range(count):
            first, second = next(of_blocks)
            before, stride = stride, stride * (2 if stage and not block else 1)
            into, out = pixels(before), pixels(stride)
            total += channels * planes * into * first
            total += (9 * planes * planes + 4 * planes * planes) * out * second
            total += 9 * channels * _OFFSETS * out * second if stage and offsets else 0
            total += channels * 4 * planes * out if not block else 0
            if densities is not None:
                total += 9 * channels * (into + out)
                total += 49 * planes * into * first * (1 - first) + 49 * 4 * planes * out * second * (
                    1 - second
                )
            channels = 4 * planes
    return total / UNIT


def main() -> None:
    """Print the table of costs, or load a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--backbone", default="resnet101", choices=list(DEPTHS))
    options = parser.parse_args()
    if options.file and not options.file.is_file():
        print(f"skipped: {options.file} is no file; without one the costs are printed.")
        return
    if options.file:
        try:
            load_published(
                backbone(options.backbone), torch.load(options.file, weights_only=True, map_location="cpu")
            )
        except cs.CadError as error:
            sys.exit(str(error))
        print(f"{options.file}: weights of a sampled {options.backbone}")
        return
    columns = ("dense", *(f"d {density}" for density in (1.0, 0.5, 0.3)))
    print(f"| resolution | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for resolution in RESOLUTIONS:
        figures = [gflops(options.backbone, resolution, density) for density in (None, 1.0, 0.5, 0.3)]
        print(f"| {resolution} | {' | '.join(f'{figure:.2f}' for figure in figures)} |")


if __name__ == "__main__":
    main()
