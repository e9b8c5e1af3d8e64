"""The options of each command, in the order of its help: names, defaults, help and limits are stated here alone.

What no page, recipe or example types is no option: it is `settable`, by `--set NAME=VALUE`.

Tasks take these dataclasses, except those that are public functions of Python: these have signatures of their own,
whose defaults a test compares with these. Like `cadsurgery.tasks.task_options`, this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from cadsurgery.support.defaults import DEFAULT_MASK, ENGINES
from cadsurgery.support.fields import documented, option, part
from cadsurgery.tasks.task_options import Benchmark, Conversion, Exporting, Extraction, Settings, bands_option

_IMAGE = "image file; default: a generated street scene"
_MASK_OF_FILE = f"default: the file's, or {DEFAULT_MASK}"


# -- options that several commands have ----------------------------------------------------------------


def weights_option(**more: Any) -> Any:
    """Declare --weights."""
    return option(
        "auto",
        "auto, none, the name of pretrained weights, or a file (FILE:ENTRY for one of its state dicts)",
        **more,
    )


def device_option() -> Any:
    """Declare --device."""
    return option("cpu", "cpu or cuda")


def trust_option() -> Any:
    """Declare --trust."""
    return option(False, "run code that the converted file names: module:function of a network or mask")


def size_option(help: str = "size of the image; default 512x1024, or the size of the file") -> Any:
    """Declare --size."""
    return option(None, help, metavar="HxW", read="size")


def strides_option() -> Any:
    """Declare --output-stride for several pairs."""
    return option(
        (),
        "repeatable; every mask is used at every pair",
        metavar="HIGH,LOW",
        read="pair",
        name="output_stride",
    )


def rounds_option(help: str = "timing rounds on the first image; 0 to skip") -> Any:
    """Declare --rounds."""
    return option(3, help, min=0)


def _mask_option(default: str) -> Any:
    return option(
        default,
        'a name from cadsurgery list --masks, with options: "edges:threshold=0.15,dilation=11", '
        'wrappers: "edges | budget:fraction=0.3", several: "edges + gradient"',
    )


def _limit_option(**more: Any) -> Any:
    return option(None, "the first so many images; 0 for all", min=0, none=0, **more)


# -- commands around a conversion ----------------------------------------------------------------------


@documented
@dataclass(frozen=True)
class ConvertOptions:
    """Options of `cadsurgery convert`."""

    mask: str = _mask_option(DEFAULT_MASK)
    weights: str = weights_option()
    conversion: Mapping[str, Any] = part(
        Conversion, "output_stride", "coarsest", "region", "fill", "normalisation", published=True
    )
    image: Path | None = option(None, _IMAGE)
    bands: tuple[int, ...] = bands_option()
    size: tuple[int, int] | None = size_option()
    output: Path | None = option(None, "file to write", short="o")
    device: str = device_option()
    rounds: int = rounds_option("timing rounds; 0 to skip timing")
    method: str = option(
        "adaptive", "adaptive, or another method (docs/methods); one that does not exist lists them"
    )
    settings: Sequence[str] = option(
        (),
        "of the method, repeatable; an unknown name lists them. Of adaptive: "
        "outputs=native, and one by one what --published sets",
        metavar="NAME=VALUE",
        name="set",
    )


@documented
@dataclass(frozen=True)
class PlanOptions:
    """Options of `cadsurgery plan`."""

    conversion: Mapping[str, Any] = part(
        Conversion, "output_stride", "coarsest", settable=("region", "outputs")
    )
    size: tuple[int, int] | None = size_option("size of the example; default: small")
    all_nodes: bool = option(False, "also list dense nodes before the region", name="all")


@documented
@dataclass(frozen=True)
class MaskOptions:
    """Options of `cadsurgery mask`."""

    masks: Sequence[str] = option(
        (), f"as in other commands; default {DEFAULT_MASK}; repeatable with --compare", name="mask"
    )
    compare: bool = option(False, "draw several masks side by side; default: a selection")
    labels: Path | None = option(None, "PNG with a class per pixel of the image, for trimap")
    size: tuple[int, int] | None = size_option()
    model: str = option(
        "",
        "network to take strides, normalisation and MACs from: a name, module:function, or a converted file",
        short="m",
    )
    weights: str = weights_option(settable=True)
    conversion: Mapping[str, Any] = part(
        Conversion, "output_stride", "normalisation", defaults=("8,32",), settable=("patch",)
    )
    bands: tuple[int, ...] = bands_option()
    output: Path = option(Path("mask.png"), "picture to write; of a clip also a clip, mask.mp4", short="o")
    trust: bool = trust_option()


@documented
@dataclass(frozen=True)
class RunOptions:
    """Options of `cadsurgery run`."""

    output: str = option(
        "predictions", "folder or address for the predictions; a clip for one source", short="o"
    )
    view: str = option(
        "",
        "classes, overlay (on the image) or side (beside it); default: classes for images, overlay for clips",
    )
    mask: str = option("", "mask, instead of the file's")
    bands: tuple[int, ...] = bands_option()
    conversion: Mapping[str, Any] = part(Conversion, settable=("normalisation",))
    size: tuple[int, int] | None = size_option("resize images to this size; default: no resizing")
    resume: bool = option(False, "resume: skip predictions that already exist")
    workers: int | None = option(
        None,
        "processes with one thread each; default: the cores, fewer for few images, and 1 on a GPU",
        min=1,
    )
    ray: str = option(
        "",
        "share the images by Ray: local, auto (the cluster that runs here) or HOST:PORT",
        metavar="ADDRESS",
    )
    batch: int = option(1, "number of images or frames that run together", min=1)
    fps: float = option(25.0, "frames per second of a folder of frames", min=0.01, settable=True)
    device: str = device_option()
    precision: str = option(
        "float", "precision of the optimised copy: float, as the weights, or bfloat16", settable=True
    )
    memory: str = option(
        "",
        "what the maps of a picture may take, e.g. 1.5GiB, or auto: pictures are computed in bands of rows, one "
        "after the other; on the CPU; default: auto for rasters with a position and where a picture would not fit",
        metavar="AMOUNT",
    )
    within: str = option(
        "",
        "compute only this area: a picture of it (not 0), boxes.json in pixels, or polygons.geojson in the raster's "
        "coordinate system; elsewhere predictions have no data",
        metavar="FILE",
    )
    overviews: bool = option(False, "TIFF files get smaller copies for viewers (cloud-optimised GeoTIFF)")
    until: float = option(
        0.0, "for a network that can stop early: time limit in milliseconds", min=0, settable=True
    )
    trust: bool = trust_option()


@documented
@dataclass(frozen=True)
class MacsOptions:
    """Options of `cadsurgery macs`."""

    mask: str = _mask_option("")
    conversion: Mapping[str, Any] = part(
        Conversion, settable=("output_stride", "region", "patch", "normalisation")
    )
    image: Path | None = option(None, _IMAGE)
    bands: tuple[int, ...] = bands_option(settable=True)
    size: tuple[int, int] | None = size_option()
    dense: bool = option(False, "count the network without converting it", settable=True)
    trust: bool = trust_option()


@documented
@dataclass(frozen=True)
class ExportOptions:
    """Options of `cadsurgery export`."""

    mask: str = option("", f"{_MASK_OF_FILE}; for pt2 {DEFAULT_MASK} | budget:fraction=0.3")
    weights: str = weights_option(settable=True)
    conversion: Mapping[str, Any] = part(Conversion, settable=True)
    bands: tuple[int, ...] = bands_option(settable=True)
    size: tuple[int, int] | None = size_option()
    output: Path = option(Path("network.pt2"), "file to write: ONNX if it ends so", short="o")
    kind: Exporting = part(
        Exporting, "dynamic", "precision", "calibration", "with_kernels", is_whole=True, settable=True
    )
    trust: bool = trust_option()


# -- commands that measure -----------------------------------------------------------------------------


@documented
@dataclass(frozen=True)
class BenchOptions:
    """Options of `cadsurgery bench`; see `cadsurgery.bench.bench`."""

    mask: str = option(DEFAULT_MASK, "mask that ranks the patches for the budgets", settable=True)
    fractions: tuple[float, ...] = option(
        (1.0, 0.5, 0.34, 0.25, 0.1, 0.0),
        "budgets: shares of the patches kept high; for a file of a method, of the positions that it computes",
        read="numbers",
    )
    fill: Sequence[str] = option(("nearest",), "nearest, linear, both or guided; repeatable")
    options: Mapping[str, Any] = part(
        Benchmark,
        *("images", "size", "output_stride", "dtype", "device", "threads", "rounds", "runtime", "against"),
        apart=True,
        settable=(
            *("batch", "coarsest", "region", "patch", "normalisation", "processor_time", "smaller"),
            *("memory", "calibration", "bands"),
        ),
    )
    picture: Path | None = option(None, "PNG to draw")
    output: Path | None = option(None, "JSON Lines to append each row to", settable=True)
    trust: bool = trust_option()


@documented
@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options of `cadsurgery eval`; see `cadsurgery.evaluate`."""

    data: str = option(
        MISSING,
        'labelled images: "folder:PATH,classes=11,ignore=11", cityscapes:PATH, voc:PATH, '
        "or scene:COUNT (generated); or photos without labels, images:FOLDER; or a clip: "
        '"clip:FILE,every=25", "clip:FILE,labels=FOLDER,classes=11"',
    )
    split: str = option("test", "train, val, test, or all for a folder without splits")
    masks: Sequence[str] = option(
        (), f"repeatable; {_MASK_OF_FILE}; dense high and low are added", name="mask"
    )
    output_stride: Sequence[tuple[int, int]] = strides_option()
    weights: str = weights_option()
    options: Mapping[str, Any] = part(
        Conversion, settable=("region", "fill", "patch", "anchor", "pool", "normalisation")
    )
    bands: tuple[int, ...] = bands_option()
    limit: int | None = _limit_option()
    batch: int = option(1, "images in one call", min=1, settable=True)
    rounds: int = rounds_option()
    thresholds: Sequence[Any] = option(
        (),
        "repeatable, for networks that stop where they are confident: one number, or one for each place but the "
        "last; default: the file's",
        metavar="T[,T...]",
        read="threshold",
        name="threshold",
    )
    kind: str = option(
        "auto", "kind of the outputs, for images without labels: auto, classes or values", settable=True
    )
    workers: int = option(1, "processes that share the images, with one thread or GPU each", min=1)
    output: Path | None = option(None, "JSON file to write", short="o")
    picture: Path | None = option(None, "PNG to draw: accuracy against work")
    device: str = device_option()
    trust: bool = trust_option()


@documented
@dataclass(frozen=True, kw_only=True)
class RecommendOptions:
    """Options of `cadsurgery recommend`; see `cadsurgery.recommend`."""

    images: str = option(MISSING, "folder of photos, clip (drive.mp4,every=25), or data as of eval --data")
    labels: str | None = option(
        None,
        "folder of PNGs named as the photos, or by the numbers of a clip's frames (000025.png): the number of the "
        "class of each pixel, 255 ignored; "
        "folder:PATH,ignore=11 ignores more",
    )
    keep: float | None = option(
        None, "share of the network's quality to keep: the fastest such setting; default 0.99"
    )
    at_most: float | None = option(
        None, "milliseconds for a picture: the best setting that takes no more", metavar="MS"
    )
    runtime: str = option("torch", f"torch, or the engine of all settings: {', '.join(ENGINES)}")
    precision: str = option("float32", "float32, bfloat16 or int8")
    size: tuple[int, int] | None = size_option("of the pictures; default: of the first")
    limit: int | None = _limit_option(settable=True)
    minutes: float = option(10.0, "for all of it, at most; then fewer settings and pictures are tried")
    split: str = option("all", "of labelled data; all: val where it has splits", settable=True)
    weights: str = weights_option()
    options: Mapping[str, Any] = part(
        Conversion, "normalisation", given=True, settable=("output_stride", "region")
    )
    bands: tuple[int, ...] = bands_option()
    output: Path | None = option(
        None, "folder of the run, default NAME-recommended; a run resumes there", short="o"
    )
    trust: bool = trust_option()


@documented
@dataclass(frozen=True)
class ExploreOptions:
    """Options of `cadsurgery explore`."""

    weights: str = weights_option()
    device: str = device_option()
    trust: bool = trust_option()


@documented
@dataclass(frozen=True)
class KeypointsOptions:
    """Options of `cadsurgery keypoints extract`; see `cadsurgery.tasks.keypoints.extract`."""

    output: Path = option(Path("features"), "folder for the features", short="o")
    settings: Extraction = part(Extraction, "mask", "detector", "count", is_whole=True, settable=True)
    form: str = option("npz", "npz (format of D2-Net) or h5 (format of hloc)")
    workers: int = option(1, "processes that share the images, with one thread or GPU each", min=1)
    weights: str = weights_option()
    options: Mapping[str, Any] = part(
        Conversion, "output_stride", settable=("region", "fill", "anchor", "pool", "normalisation")
    )
    bands: tuple[int, ...] = bands_option(settable=True)
    device: str = device_option()
    trust: bool = trust_option()


# -- others --------------------------------------------------------------------------------------------


@documented
@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """Options of `cadsurgery finetune`."""

    data: str = option(MISSING, "training data: folder:PATH, ..., or photos without labels, images:FOLDER")
    output: Path = option(MISSING, "folder of the run; an interrupted run is continued", short="o")
    split: str = option("train", "split for training", settable=True)
    validation_split: str = option("val", "split for validation; empty for none", settable=True)
    mask: str = option("", _MASK_OF_FILE)
    weights: str = weights_option()
    conversion: Mapping[str, Any] = part(Conversion, "output_stride", published=True, settable=True)
    bands: tuple[int, ...] = bands_option()
    settings: Mapping[str, Any] = part(Settings, given=True, settable=True)
    config: Path | None = option(None, "TOML or JSON file of settings; --set overrides it")
    device: str = option("auto", "auto or cpu")
    trust: bool = trust_option()


@documented
@dataclass(frozen=True)
class ListOptions:
    """Options of `cadsurgery list`."""

    masks: bool = option(False, "list mask providers instead")
