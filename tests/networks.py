"""Toy networks that several test files use, and networks of the libraries with random weights: nothing is downloaded.

A network whose one peculiarity is what a test is about stands beside that test.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.data.images import SCENE_CLASSES, street_scene
from cadsurgery.following.arguments import take_image
from cadsurgery.following.facts import Facts
from cadsurgery.surgery.rules import read

# -- networks that are made once -----------------------------------------------------------------------

Make = TypeVar("Make", bound=Callable[..., Any])
_PLAIN = (str, int, float, type(None), type, torch.dtype)
_LARGEST = 16 << 20  # bytes of a network that is kept


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, _PLAIN)


def made_once(make: Make) -> Make:
    """What `make` builds, made once in a process for the same plain arguments and random numbers.

    Each call gets a copy, and random numbers go on as if it had been made: a test sees no difference but in time.
    """
    kept: dict[Any, tuple[nn.Module, Tensor]] = {}

    @wraps(make)
    def copy_of(*args: Any, **options: Any) -> Any:
        given = (*args, *((name, value) for name, value in options.items()))
        if not _is_plain(given):
            return make(*args, **options)
        key = (given, torch.get_rng_state().numpy().tobytes())
        if key not in kept:
            made = make(*args, **options)
            if sum(value.nbytes for value in made.state_dict().values()) > _LARGEST:
                return made
            kept[key] = copy.deepcopy(made), torch.get_rng_state()
            return made
        made, state = kept[key]
        torch.set_rng_state(state)
        return copy.deepcopy(made)

    return cast(Make, copy_of)


# -- random weights ------------------------------------------------------------------------------------


def randomise(model: nn.Module) -> nn.Module:
    """Norms with random statistics and affine parts, so that no branch is dead; in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0.0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.1)
    return model.eval()


@made_once
def build(name: str, dtype: torch.dtype = torch.float32, *, by: int = 1, **options: Any) -> nn.Module:
    """A torchvision network with random weights and a `by`-th of its channels; nothing is downloaded."""
    if torchvision.models.get_model_builder(name).__module__.startswith("torchvision.models.segmentation"):
        options = {"weights_backbone": None, **options}
    return thin(lambda: torchvision.models.get_model(name, weights=None, **options), by).to(dtype)


def thin(make: Callable[[], nn.Module], by: int = 4) -> nn.Module:
    """What `make` builds with a `by`-th of the channels: the same layers, names and geometry, little work.

    The wide network is built without storage, so it costs nothing, unless its builder asks for values of tensors.
    Images and classes keep their channels.
    """
    if by == 1:
        return randomise(make())
    try:
        with torch.device("meta"):
            model = make()
    except NotImplementedError:
        model = make()
    for module in model.modules():
        for name in ("num_features", "in_channels", "out_channels", "groups", "in_features", "out_features"):
            channels = getattr(module, name, 0)
            if isinstance(channels, int) and channels % by == 0 and channels not in (3, 1000):
                setattr(module, name, channels // by)
        if isinstance(module, nn.BatchNorm2d):
            for tensors in (module._parameters, module._buffers):
                for name, wide in tensors.items():
                    values = torch.zeros(module.num_features if wide.dim() else (), dtype=wide.dtype)
                    tensors[name] = nn.Parameter(values) if isinstance(wide, nn.Parameter) else values
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d | nn.Linear):
            if isinstance(module, nn.Conv2d):
                shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
            else:
                shape = (module.out_features, module.in_features)
            module.weight = nn.Parameter(
                nn.init.kaiming_normal_(torch.empty(shape), mode="fan_out", nonlinearity="relu")
            )
            if module.bias is not None:
                module.bias = nn.Parameter(0.1 * torch.randn(shape[0]))
    return randomise(model)


def seeded(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """What `make` builds, with the same random weights and norms whenever it is called."""
    torch.manual_seed(seed)
    return randomise(make()).to(dtype)


# -- parts ---------------------------------------------------------------------------------------------


def conv_norm(
    inputs: int,
    outputs: int,
    stride: int = 1,
    dilation: int = 1,
    kernel: int = 3,
    groups: int = 1,
    bias: bool = True,
    inplace: bool = False,
) -> nn.Sequential:
    """A convolution padded to keep its size but for the stride, batch norm and ReLU: what most networks consist of."""
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace))


class InvertedBottleneck(nn.Module):
    """Expand, depthwise, squeeze and excite, project, add: what reads around, of an image, and of a position."""

    def __init__(self, channels: int, out: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        wide = 2 * channels
        self.expand = conv_norm(channels, wide, kernel=1, bias=False, inplace=True)
        self.depthwise = conv_norm(wide, wide, stride, dilation, groups=wide, bias=False, inplace=True)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, wide, 1), nn.Sigmoid())
        self.project = nn.Sequential(nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out))
        self.skips = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        y = self.project(y * self.gate(y))
        return y + x if self.skips else y


class Residual(nn.Module):
    """Two convolutions with norms beside a shortcut, as in a ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one = conv_norm(channels, channels)
        self.two = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.two(self.one(x)))


# -- networks without branches -------------------------------------------------------------------------


def strided(
    depth: int = 5,
    channels: int = 4,
    *,
    inputs: int = 3,
    groups: int = 1,
    norm: bool = False,
    outputs: int = 0,
    kernel: int = 1,
) -> nn.Sequential:
    """`depth` convolutions that halve the map, each with a ReLU: converts in milliseconds.

    Args:
        depth: the output stride is 2 to its power.
        channels: of all maps.
        inputs: channels of the image.
        groups: of all convolutions but the first.
        norm: whether each convolution is followed by a batch norm.
        outputs: channels of one more convolution at the end, without stride; 0: there is none.
        kernel: side of the last convolution's window.
    """
    layers: list[nn.Module] = []
    for place in range(depth):
        layers.append(
            nn.Conv2d(channels if place else inputs, channels, 3, 2, 1, groups=groups if place else 1)
        )
        layers += [nn.BatchNorm2d(channels), nn.ReLU()] if norm else [nn.ReLU()]
    if outputs:
        layers.append(nn.Conv2d(channels, outputs, kernel, 1, kernel // 2))
    return nn.Sequential(*layers).eval()


@made_once
def adapted_strided(mask: object = "edges", **options: Any) -> cs.AdaptiveModel:
    """Converted from output stride 32, for what a mask gives."""
    return cs.adaptify(strided(), mask, verify_laws=False, **options)


class NamedParts(nn.Module):
    """A stem, a region of two strided convolutions with a norm each, and a head: what reports name by its path."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 4, 1)
        self.body = nn.Sequential(*conv_norm(4, 8, 2), *conv_norm(8, 8, 2))
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))


class Encoded(nn.Module):
    """Three strided convolutions, and what a function makes of the network, the image and its map.

    Args:
        then: the function.
        channels: of the map, and of what a 1x1 convolution `head` gives.
        kept: what the network holds besides, by name.
    """

    def __init__(self, then: Callable[[Any, Tensor, Tensor], Tensor], channels: int = 8, **kept: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encode, self.then = nn.Sequential(*strided(3, channels)[:-1], nn.Sigmoid()), then
        self.head = nn.Conv2d(channels, channels, 1)
        for name, value in kept.items():
            setattr(self, name, value)

    def forward(self, image: Tensor) -> Tensor:
        return self.then(self, image, self.encode(image))


class Composed(nn.Module):
    """What a function makes of parts by name, which it reads from the network, and of an image."""

    def __init__(self, then: Callable[[Any, Any], Any], **parts: Any) -> None:
        super().__init__()
        self.then = then
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Any) -> Any:
        return self.then(self, x)


# Converted without the comparison of laws, which takes most of the time of a conversion.
unverified = partial(cs.adaptify, verify_laws=False)


def converted_quietly(model: nn.Module, **options: Any) -> cs.AdaptiveModel:
    """Converted to return maps at the network's own size; that masks change little is not the point."""
    options = {"output_stride": (2, 8), "example_input": torch.rand(1, 3, 64, 64), **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cs.CadWarning)
        return cs.adaptify(model.eval(), mask="none", outputs="native", **options)


def followed(model: nn.Module) -> Facts:
    """Read by torch.fx whole, which is the point, and no part of it."""
    weight = next(model.parameters())
    return read(model.eval(), take_image(model, torch.rand(1, 3, 64, 64).to(weight)))


# -- networks with stages, for exits and sampled inputs ------------------------------------------------


class Chain(nn.Module):
    """A backbone of stages, the last ones dilated, and a head that is resized to the image."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        own = {"bias": False, "inplace": True}
        self.stem = nn.Sequential(conv_norm(3, 8, 2, **own), conv_norm(8, 8, 2, **own))
        self.stage1 = nn.Sequential(InvertedBottleneck(8, 8), InvertedBottleneck(8, 8))
        self.stage2 = nn.Sequential(InvertedBottleneck(8, 12, 2), InvertedBottleneck(12, 12))
        self.stage3 = nn.Sequential(InvertedBottleneck(12, 12, 1, 2), InvertedBottleneck(12, 16, 1, 2))
        self.stage4 = nn.Sequential(InvertedBottleneck(16, 16, 1, 2), InvertedBottleneck(16, 16, 1, 4))
        self.head = nn.Sequential(conv_norm(16, 8, **own), nn.Dropout(0.1), nn.Conv2d(8, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x)))))
        return F.interpolate(self.head(y), size=x.shape[-2:], mode="bilinear", align_corners=False)


class Classifier(Chain):
    """Returns one answer for an image: there is no map to read back."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean((2, 3))


# -- segmentation networks -----------------------------------------------------------------------------


class SmallUNet(nn.Module):
    """Pooling, strides, a transposed convolution and a bilinear resize, with skips."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.two = nn.Conv2d(width, 2 * width, 5, 1, 2, groups=2)
        self.four = nn.Conv2d(2 * width, 3 * width, 3, 2, 1)
        self.up = nn.ConvTranspose2d(3 * width, 2 * width, 2, 2)
        self.join = nn.Conv2d(4 * width, width, 3, padding=2, dilation=2)
        self.last = nn.Conv2d(2 * width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(F.max_pool2d(one, 2)).relu()
        deep = self.up(self.four(two).relu())
        joined = self.join(torch.cat([deep, two], 1))
        up = F.interpolate(joined, scale_factor=2, mode="bilinear", align_corners=False)
        return self.last(torch.cat([up, one], 1))


class DilatedWithHead(nn.Module):
    """Output stride 4 with two strides removed, and a head of a plain 3x3, a rate that fits no cell, a pooling, a mean
    over the image, and a last 3x3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.first, self.two = nn.Conv2d(8, 12, 3, 1, 1), nn.Conv2d(12, 12, 3, 1, 2, 2)
        self.again, self.four = nn.Conv2d(12, 12, 3, 1, 2, 2), nn.Conv2d(12, 12, 3, 1, 4, 4)
        self.plain, self.rate = nn.Conv2d(12, 6, 3, 1, 1), nn.Conv2d(12, 6, 3, 1, 3, 3, groups=2)
        self.pool, self.last = nn.MaxPool2d(3, 1, 1), nn.Conv2d(24, 5, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.first(self.stem(x)).relu()).relu()
        y = self.four(self.again(y).relu()).relu()
        joined = torch.cat([self.plain(y).relu(), self.rate(y).relu(), self.pool(y)], 1)
        joined = joined * torch.sigmoid(F.adaptive_avg_pool2d(y, 1).mean(1, keepdim=True))
        return F.interpolate(self.last(joined), size=x.shape[2:], mode="bilinear", align_corners=False)


class Segmenter(nn.Module):
    """Output stride 16 by four stages; with dropout, so that random numbers matter in training."""

    def __init__(self, classes: int = len(SCENE_CLASSES)) -> None:
        super().__init__()
        pairs = ((3, 8), (8, 8), (8, 12), (12, 16))
        self.backbone = nn.Sequential(*(conv_norm(*pair, 2, bias=False, inplace=True) for pair in pairs))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Conv2d(16, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        found = self.classifier(self.backbone(x))
        return F.interpolate(found, size=x.shape[-2:], mode="bilinear", align_corners=False)


def segmenter() -> nn.Module:
    """A `Segmenter` with the same weights whenever it is called, for networks by `module:function`."""
    torch.manual_seed(0)
    return Segmenter()


def saved_segmenter(path: Path) -> Path:
    """Write a converted `segmenter`, and return its file."""
    model = cs.build_model("networks:segmenter").eval()
    net = cs.adaptify(model, "edges", output_stride=(8, 16), normalisation="raw", verify_laws=False)
    cs.save(net, path)
    return path


class ResidualSegmenter(nn.Module):
    """Two residual blocks at stride 4, which gates and exits can stand behind."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), Residual(8), Residual(8))
        self.classifier = nn.Conv2d(8, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.classifier(self.backbone(x)), x.shape[2:], mode="bilinear")


class SureSegmenter(nn.Module):
    """Output stride 16, the map enlarged to the image's size; sure of itself here and there."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = conv_norm(3, 6, 2, inplace=True)
        self.body = nn.Sequential(
            *conv_norm(6, 6, 2, inplace=True),
            *(nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU(inplace=True)),
            *(nn.Conv2d(8, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, classes, 1)),
        )
        self.body[8].weight.data *= 20

    def forward(self, image: Tensor) -> Tensor:
        small = self.body(self.stem(image))
        return F.interpolate(small, size=image.shape[-2:], mode="bilinear", align_corners=False)


class StreetSegmenter(nn.Module):
    """Six classes at output stride 32; says what images it expects, and may return a dictionary."""

    def __init__(self, classes: int = 6, as_dictionary: bool = False) -> None:
        super().__init__()
        self.layers = strided(channels=8, norm=True, outputs=classes, kernel=3)
        self.as_dictionary = as_dictionary
        self.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}  # as timm's networks say it

    def forward(self, x: Tensor) -> Any:
        scores = self.layers(x)
        return {"out": scores} if self.as_dictionary else scores


def street_segmenter(**options: Any) -> nn.Module:
    """Its norms fit street scenes, so that its predictions vary from place to place."""
    torch.manual_seed(3)
    model = StreetSegmenter(**options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    last: Any = model.layers[-1]
    nn.init.zeros_(last.bias)
    model.train()(torch.stack([street_scene(96, 160, seed) for seed in range(4)]))
    return model.eval()


class PooledSegmenter(nn.Module):
    """Norms, two max-pooling stages, a named backbone and a final resize; returns a dictionary."""

    def __init__(self, classes: int = 3, width: int = 4) -> None:
        super().__init__()

        def stage(channels: int, stride: int) -> nn.Sequential:
            return conv_norm(channels, width, stride, bias=False, inplace=True)

        self.backbone = nn.Sequential(
            *(*stage(3, 2), nn.MaxPool2d(2), *stage(width, 2)),
            *(*stage(width, 1), nn.MaxPool2d(2), *stage(width, 2)),
        )
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scores = self.classifier(self.backbone(x))
        return {"out": F.interpolate(scores, size=x.shape[-2:], mode="bilinear", align_corners=False)}


@made_once
def adapted(mask: object = "edges:threshold=0.9,dilation=3", **options: Any) -> cs.AdaptiveModel:
    """A converted `PooledSegmenter`, for files and the Hub."""
    return cs.adaptify(randomise(PooledSegmenter()), mask, verify_laws=False, **options)


class ManyOperations(nn.Module):
    """Strided, dilated, depthwise and grouped convolutions, pooling, a gate, a skip, a resize to the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = conv_norm(3, 8, 2), conv_norm(8, 16, 2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.depthwise = nn.Sequential(
            nn.Conv2d(16, 16, 3, 1, 2, 2, groups=16), nn.BatchNorm2d(16), nn.Hardswish()
        )
        self.grouped = nn.Conv2d(16, 16, 3, 1, 1, groups=4)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Sigmoid())
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        size = x.shape[2:]
        x = self.pool(self.down(self.stem(x)))
        x = x + self.grouped(self.depthwise(x))
        x = self.head(x * self.gate(x))
        return {"out": F.interpolate(x, size=size, mode="bilinear", align_corners=False)}


# -- networks that torch.fx cannot follow whole --------------------------------------------------------


class Undecided(nn.Module):
    """Decides by values, so that only its backbone is converted; expects the images that its backbone does."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        if hasattr(backbone, "pretrained_cfg"):
            self.pretrained_cfg = backbone.pretrained_cfg

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x if x.sum() > 0 else x + 0)
