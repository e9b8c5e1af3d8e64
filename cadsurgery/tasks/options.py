"""Options of commands as dataclasses; names, defaults and help are defined only here.

This module does not import torch, so that the command line starts quickly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cadsurgery.support.errors import InvalidInput, UnknownName

if TYPE_CHECKING:
    from cadsurgery.network.points import Align, Reach


def option(default: Any, help: str, **more: Any) -> Any:
    """Declare a dataclass field that a command has an option for.

    Args:
        default: default of the field and of the option.
        help: help of the option; `{default}` stands for the default.
        more: further properties of the option: `min`, `metavar`, a `name` other than the field's, and `read`, the
            name of the parser of its value.
    """
    return field(default=default, metadata={"help": help.replace("{default}", str(default)), **more})


@dataclass(frozen=True)
class Conversion:
    """How a network is converted; see `cadsurgery.adaptify`."""

    output_stride: tuple[int, int] | None = option(
        None, "e.g. 8,32; default: the network's own range", metavar="HIGH,LOW", read="pair"
    )
    region: str | list[str] = option(
        "auto", "auto, backbone, or names of modules, separated by commas", read="names"
    )
    fill: str = option("linear", "how points inside a cell are read: linear, nearest or guided")
    patch: str = option("quadtree", "shape of areas kept high: quadtree or block")
    anchor: str = option("corner", "corner, or center to reproduce the published code")
    pool: str = option("atrous", "max-pool stages: atrous, or drop as published")
    outputs: str = option(
        "fine",
        "size of returned maps that leave the region as they are: fine, or native as the network returns them",
    )
    normalisation: Any = option(
        None,
        "mean and deviation of its pictures in 0..1, e.g. 0.5/0.5 or R,G,B/R,G,B, for what masks see; "
        "raw: they see the input as it comes; default: as stated",
        metavar="MEAN/STD",
        read="normalisation",
    )


@dataclass(frozen=True)
class Exits:
    """How exits are added to a network; see `cadsurgery.anytime`."""

    exits: str | list[str] = option(
        "auto", "names of modules or nodes, separated by commas; or auto", read="names"
    )
    head: str = option("redesigned", "{default}, or plain")
    classes: int = option(0, "number of classes, for a backbone", min=0)
    hidden: int = option(0, "channels inside the heads; 0 for the default", min=0)
    threshold: Any = option(
        0.998,
        "confidence of exits, one number or one for each exit but the last; default {default}",
        metavar="T[,T...]",
        read="threshold",
    )
    confidence: str = option("probability", "{default}, or entropy")
    gaps: str = option("gaussian", "what fills skipped positions: {default}, interpolated or zeros")


@dataclass(frozen=True)
class Sampling:
    """How the input of a network is sampled; see `cadsurgery.resample`."""

    sampler: str = option("learned", "{default}, labels, uniform, or a mask")
    sample_size: tuple[int, int] = option((224, 224), "size of the sampled image", metavar="HxW", read="size")
    grid: int = option(8, "locations per side of the grid; default {default}", min=2, name="sample_grid")
    smoothness: float = option(1.0, "smoothness of the grid; default {default}")
    targets: str = option(
        "", "numbers of the classes whose boundaries matter, separated by commas; default all"
    )


@dataclass(frozen=True)
class Gates:
    """How gates are added to a network; see `cadsurgery.sample`."""

    where: str | list[str] = option(
        "auto", "names of modules or convolutions, separated by commas; or auto", read="names"
    )
    grid: int = option(
        11, "distance of positions that are always computed; default {default}, 0 for none", min=0
    )
    noise: bool = option(False, "gates draw noise in evaluation, as published")


@dataclass(frozen=True)
class Exporting:
    """The kind of file that a network is exported to; see `cadsurgery.export`."""

    to: str = option("", "pt2, onnx or aoti; default: onnx for a file that ends so, else pt2")
    dynamic: bool = option(False, "ONNX for images of any size and number, and any mask")
    level_map: bool = option(False, "ONNX with the level map as a second input, in place of the mask")
    float16: bool = option(False, "ONNX with weights and features in half precision")
    int8: str = option(
        "",
        "ONNX with weights and features in 8 bits, calibrated by the images of this folder",
        metavar="IMAGES",
    )
    check_in: str = option(
        "onnx", "engine that runs the ONNX file to compare it: onnx (ONNX Runtime) or openvino"
    )


@dataclass(frozen=True)
class Benchmark(Conversion):
    """How networks are converted, and the conditions of a benchmark; see `cadsurgery.bench.bench`."""

    size: tuple[int, int] = option(
        (512, 1024), "size of the generated street scenes", metavar="HxW", read="size"
    )
    batch: int = option(1, "number of images", min=1)
    dtype: str = option("float32", "{default}, bfloat16, or int8")
    device: str = option("cpu", "{default} or cuda")
    threads: int = option(0, "threads on the CPU; 0 for torch's own choice", min=0)
    rounds: int = option(7, "timing rounds; each runs every side once", min=1)
    processor_time: bool = option(
        False, "measure processor time instead of elapsed time, for a shared machine; needs one thread"
    )
    memory: bool = option(False, "also measure peak memory, each side in a process of its own")
    runtime: str = option(
        "torch", "{default}, or an engine that all sides are exported to: onnx, openvino or aoti"
    )
    against: str = option(
        "",
        "also time the dense networks in these engines, in every precision they have: onnxruntime,openvino",
        metavar="ENGINES",
    )
    isa: str | tuple[str, ...] = option(
        "",
        "measure with these instruction sets, e.g. avx2,avx512, each in processes of its own, in which torch, oneDNN "
        "and MKL are capped alike",
        metavar="ISAS",
    )
    calibration: str = option(
        "", "folder of images that int8 is calibrated by; default: the scenes it is measured on"
    )


@dataclass(frozen=True)
class Extraction:
    """How keypoints are found and described.

    A `detector` of the user is a function of the image batch in the unit of masks that returns for each image points
    (n, 2), or a score map. `reach` and `align` are arguments of `cadsurgery.read_at`. `output` is the name or
    position of the descriptor map among several outputs; if it is empty, the only map of several channels is used.
    Large images are reduced until `max_edge` and `max_sum` hold, and cropped to a `multiple`.
    """

    detector: str = option(
        "sift", "sift, own (the network's score map), or module:function of the image batch"
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
        from cadsurgery.masks.keypoints import OWN, SIFT
        from cadsurgery.network.points import ALIGNMENTS, REACHES

        if self.count < 1 or self.multiple < 1 or min(self.max_edge, self.max_sum) < 0:
            raise InvalidInput(
                f"count={self.count}, multiple={self.multiple}, max_edge={self.max_edge}, max_sum={self.max_sum}.",
                next="give at least 1 keypoint, a multiple of at least 1, and sizes of 0 (any) or more.",
            )
        for kind, name, known in (("reach", self.reach, REACHES), ("alignment", self.align, ALIGNMENTS)):
            if name not in known:
                raise UnknownName(kind, name, known)
        if self.detector not in (SIFT, OWN) and ":" not in self.detector:
            raise UnknownName("detector", self.detector, (SIFT, OWN), next="or module:function.")
