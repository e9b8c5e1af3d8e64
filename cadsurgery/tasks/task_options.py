"""Options of commands as dataclasses; names, defaults and help are defined only here.

This module does not import torch, so that the command line starts quickly.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cadsurgery.support.defaults import ENGINES, KERNELS
from cadsurgery.support.errors import FileError, InvalidInput, UnknownName, check_name, first_line
from cadsurgery.support.fields import documented, option
from cadsurgery.support.kinds import JSON, of_another_kind
from cadsurgery.support.rows import plain

if TYPE_CHECKING:
    from cadsurgery.network.points import Align, Reach


_WITHOUT_KERNELS = [name for name in ENGINES if not name.endswith(KERNELS)]


def bands_option(**more: Any) -> Any:
    """Declare --bands."""
    return option(
        (),
        "which bands of the pictures' files to read, counted from 1, in the order of the network's channels, e.g. "
        "3,2,1. Default: those of the network; else all: as many as channels are read as they are, colour becomes grey "
        "(ITU-R BT.601), grey becomes colour, transparency is left out",
        metavar="N[,N...]",
        read="bands",
        **more,
    )


@documented
@dataclass(frozen=True)
class Conversion:
    """How a network is converted; see `cadsurgery.adaptify`."""

    output_stride: tuple[int, int] | None = option(
        None, "e.g. 8,32; default: the network's own range", metavar="HIGH,LOW", read="pair"
    )
    coarsest: int | None = option(
        None,
        "keep the network's own grid where the mask says so, and compute no map finer than so many pixels elsewhere, "
        "e.g. 32; instead of an output stride",
        metavar="PIXELS",
        read="whole",
    )
    region: str | list[str] = option(
        "auto",
        "auto, heads (also through heads whose taps fall inside cells), backbone, or names of modules, separated by "
        "commas",
        read="names",
    )
    fill: str = option("linear", "how points inside a cell are read: linear, nearest or guided")
    patch: str = option("quadtree", "shape of areas kept high: quadtree or block")
    anchor: str = option("corner", "point of a cell at which it is read: corner, or center as published")
    pool: str = option("atrous", "max-pool stages: atrous, or drop as published")
    outputs: str = option(
        "fine",
        "size of returned maps that leave the region as they are: fine, or native as the network returns them",
    )
    normalisation: Any = option(
        None,
        "mean and deviation of its pictures in 0..1, for all channels or for each, e.g. 0.5/0.5 or R,G,B/R,G,B: "
        "how pictures are prepared, and what masks undo; or a name. imagenet: ImageNet's; none: pictures are taken as "
        "they are; bands: those of each band of the pictures that this command reads; raw: masks see the input as it "
        "comes. Default: as the network states, else ImageNet's, averaged where it reads other than 3 channels",
        metavar="MEAN/STD",
        read="normalisation",
    )


# How the published code converts, which `--published` reproduces.
PUBLISHED = {"anchor": "center", "pool": "drop", "patch": "block"}


@documented
@dataclass(frozen=True)
class Exporting:
    """The kind of file that a network is exported to; see `cadsurgery.export`."""

    to: str = option("", "pt2 or onnx; default: onnx for a file that ends so, else pt2")
    dynamic: bool = option(False, "ONNX for images of any size and number, and any mask")
    precision: str = option(
        "float", "{default}, as the network's; ONNX with weights and features in float16, or in int8"
    )
    calibration: str = option(
        "",
        "folder of images, or clip (drive.mp4,every=25), by which int8 is calibrated, without labels",
        metavar="PLACE",
    )
    with_kernels: bool = option(
        False,
        "ONNX whose convolutions run in this package's kernels where cadsurgery.kernels_for is registered",
    )
    check_in: str = option(
        "onnx",
        f"engine that runs the ONNX file to compare it: {', '.join(_WITHOUT_KERNELS)}",
    )


@documented
@dataclass(frozen=True)
class Benchmark(Conversion):
    """How networks are converted, and the conditions of a benchmark; see `cadsurgery.bench.bench`."""

    size: tuple[int, int] = option(
        (512, 1024), "size of the pictures that are measured on", metavar="HxW", read="size"
    )
    images: str = option(
        "",
        "folder of photos or clip (drive.mp4,every=25) to measure on; default: generated street scenes",
        metavar="PLACE",
    )
    batch: int = option(1, "number of images", min=1)
    dtype: str = option("float32", "{default}, bfloat16, or int8: in an engine, by default onnx-kernels")
    device: str = option("cpu", "{default} or cuda")
    threads: int = option(0, "threads on the CPU; 0 for torch's own choice", min=0)
    rounds: int = option(7, "timing rounds; each runs every side once", min=1)
    processor_time: bool = option(
        False, "measure processor time instead of elapsed time, for a shared machine; needs one thread"
    )
    runtime: str = option(
        "torch",
        f"{{default}}, or an engine that all sides are exported to: {', '.join(ENGINES)}",
    )
    against: str = option(
        "",
        "also time the dense networks in these engines, in every precision they have: onnxruntime,openvino",
        metavar="ENGINES",
    )
    smaller: float = option(
        0.0,
        "also time dense high on pictures of this scale, e.g. 0.7, resized in the call; 0 for none",
        min=0,
    )
    memory: str = option(
        "",
        "also time the network as given in bands of rows, whose maps take no more than this, e.g. 512MiB",
        metavar="AMOUNT",
    )
    calibration: str = option(
        "", "folder of images, or clip, by which int8 is calibrated; default: the pictures it is measured on"
    )
    bands: tuple[int, ...] = bands_option()


@dataclass(frozen=True)
class Extraction:
    """How keypoints are found and described.

    A `detector` of the user is a function of the image batch in the unit of masks that returns for each image points
    (n, 2), or a score map. `reach` and `align` are arguments of `cadsurgery.read_at`. `output` is the name or
    position of the descriptor map among several outputs; if it is empty, the only map of several channels is used.
    Large images are reduced until `max_edge` and `max_sum` hold, and cropped to a `multiple`.
    """

    detector: str = option(
        "sift",
        'sift, own (the network\'s score map, with --mask "keypoints:detector=own" or a mask of the picture), or '
        "module:function of the image batch (1, C, H, W), which returns a list with points (n, 2), x and y in pixels, "
        "for each image, or a score map (1, h, w)",
    )
    count: int = option(512, "maximum number of keypoints per image", min=1)
    mask: str = option(
        "keypoints:detector=given",
        'mask; "{default}" uses the extracted keypoints; empty: the mask of the file',
    )
    reach: Reach = option(
        "receptive", "receptive: compute only what the keypoints depend on; all: everything"
    )
    align: Align = option(
        "cell", "sample read for a point: cell, the sample that covers it; corners, as published for D2-Net"
    )
    raw: bool = option(False, "descriptors as the network returns them, not normalised")
    output: str = option("", "which output holds the descriptors, if there are several", name="output_name")
    max_edge: int = option(0, "maximum of the longer side of images, in pixels; 0 for any", min=0)
    max_sum: int = option(0, "maximum of height plus width (2800 as published); 0 for any", min=0)
    multiple: int = option(1, "crop sizes to multiples of this number (8 as published)", min=1)

    def __post_init__(self) -> None:
        from cadsurgery.masks.keypoint_masks import OWN, SIFT
        from cadsurgery.network.points import ALIGNMENTS, REACHES

        if self.count < 1 or self.multiple < 1 or min(self.max_edge, self.max_sum) < 0:
            raise InvalidInput(
                f"count={self.count}, multiple={self.multiple}, max_edge={self.max_edge}, max_sum={self.max_sum}.",
                next="give at least 1 keypoint, a multiple of at least 1, and sizes of 0 (any) or more.",
            )
        check_name("reach", self.reach, REACHES)
        check_name("alignment", self.align, ALIGNMENTS)
        if self.detector not in (SIFT, OWN) and ":" not in self.detector:
            raise UnknownName("detector", self.detector, (SIFT, OWN), next="or module:function.")


# -- training ------------------------------------------------------------------------------------------

CHOICES = {
    "optimizer": ("sgd", "adamw"),
    "precision": ("no", "fp16", "bf16"),
    "batch_norm": ("train", "frozen"),
    "freeze": ("", "stem"),
    "train": ("all", "exits", "gates"),
    "log": ("csv", "tensorboard"),
}
# Settings that may change when a run is resumed, because they do not affect the weights.
FREE = ("save_every", "validate_every", "log", "workers")


@documented
@dataclass(frozen=True)
class Settings:
    """How a network is trained; the defaults are published (Hesse et al., CVPRW 2023, supplementary B)."""

    steps: int = option(
        30_000, "optimiser steps, over which the learning rate falls to its floor; default {default}"
    )
    batch: int = option(8, "images per process and forward pass; default {default}")
    accumulate: int = option(1, "passes per step, whose gradients are averaged; default {default}")
    lr: float = option(0.1, "initial learning rate of the classifier; default {default}")
    backbone_factor: float = option(0.1, "factor of lr for the backbone")
    mask_factor: float = option(0.01, "factor of lr for the parameters of the mask")
    power: float = option(0.9, "exponent of the polynomial schedule lr (1 - step / steps)^power")
    lr_floor: float = option(1e-6, "smallest learning rate of any group")
    optimizer: str = option("sgd", "{default} (default) or adamw")
    momentum: float = option(0.9, "momentum of SGD")
    weight_decay: float = option(1e-4, "weight decay of all trained parameters")
    clip: float = option(0.0, "maximum norm of the gradient; default none")
    crop: int = option(768, "side of the training crops in pixels; default {default}, 0 for whole images")
    flip: bool = option(True, "mirror half of the images")
    jitter: float = option(0.5, "strength of brightness, contrast and saturation jitter")
    scale: tuple[float, float] = option(
        (1.0, 1.0), "range of random scaling, e.g. 0.5,2; 1,1 for none", read="numbers"
    )
    precision: str = option("no", "{default} (default: float32), fp16 or bf16 autocast")
    batch_norm: str = option(
        "train",
        "{default} (default); or frozen: running statistics are used and not updated, the rest is trained",
    )
    freeze: str = option("", "stem: layers before the adaptive region are not trained")
    train: str = option(
        "all",
        "{default} (default); or only: exits, their heads and the widths of their Gaussians; or gates",
    )
    ema: float = option(
        0.0, "decay per step of an average of the weights, which is validated and saved; 0 for none"
    )
    seed: int = option(0, "seed of everything random; default {default}")
    objective: str = option(
        "",
        "mixed (default), divergence (default without labels), any-budget, blend for a learned mask, or one of a "
        "method, whose networks have it as their default; docs/reference/objectives.md has them and their options",
    )
    objective_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "options of the objective by name"}
    )
    save_every: int = option(500, "steps between checkpoints; default {default}")
    validate_every: int = option(1000, "steps between validations; default {default}")
    log: str = option("csv", "{default} (default) or tensorboard")
    workers: int = option(4, "processes that load images, 0 for none; default {default}")

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            check_name(name, str(getattr(self, name)), choices)
        for setting in fields(self):
            _check(setting.name, getattr(self, setting.name), setting.type)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        values: dict[str, Any] = plain(asdict(self))
        return values

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Settings:
        """Create settings from the result of `to_dict`, or a part of it; missing settings have their defaults.

        Raises:
            UnknownName: there is no such setting, or no such choice for a setting.
            InvalidInput: a value is out of range or has the wrong type.
        """
        return Settings().changed(values)

    def changed(self, values: dict[str, Any]) -> Settings:
        """Return a copy with changed values; raises as `from_dict`."""
        names = [setting.name for setting in fields(Settings)]
        for name in values:
            check_name("setting", name, names)
        changes: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return replace(self, **changes)

    @staticmethod
    def read(path: Path) -> Settings:
        """Read settings from a TOML or JSON file with some or all of them.

        Raises:
            FileError: the file is missing, or is neither TOML nor a JSON object.
            UnknownName, InvalidInput: as `from_dict`.
        """
        read = tomllib.loads if path.suffix.lower() == ".toml" else json.loads
        try:
            values = read(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            refusal = FileError(
                f"{path} cannot be read as settings.",
                why=first_line(error),
                next='write a JSON object such as {"steps": 1000, "lr": 0.01}, or TOML: steps = 1000 in a line.',
            )
            raise of_another_kind(path, JSON) or refusal from error
        if not isinstance(values, dict):
            raise FileError(f"{path} holds no JSON object.", next='write e.g. {"steps": 1000}.')
        return Settings.from_dict(values)


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("steps", "batch", "accumulate", "lr", "power", "save_every", "validate_every"),
        (lambda value: value > 0, "above 0"),
    ),
    **dict.fromkeys(("momentum", "ema"), (lambda value: 0 <= value < 1, "in 0..1, 1 excluded")),
    "scale": (lambda pair: len(pair) == 2 and 0 < pair[0] <= pair[1], "two numbers, 0 < low <= high"),
}
_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "int": (int, "an integer"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "a text"),
    "tuple[float, float]": (tuple, "two numbers"),
    "dict[str, Any]": (dict, "an object"),
}


def _check(name: str, value: Any, kind: Any) -> None:
    expected, words = _KINDS[kind]
    if not isinstance(value, expected) or (isinstance(value, bool) and kind != "bool"):
        raise InvalidInput(f"setting {name}={value!r} is not {words}.", next=f"give {words}.")
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    inside, words = _RANGES.get(name, (lambda number: not numeric or number >= 0, "0 or above"))
    if not inside(value):  # NaN fails every comparison
        raise InvalidInput(f"setting {name}={value} is out of range.", next=f"it must be {words}.")
