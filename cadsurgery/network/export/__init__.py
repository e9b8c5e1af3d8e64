"""Export networks to run without this package: programs of torch.export and ONNX files.

In come an adaptive network and an image; out comes a file with mask, lattice and network. Before the file appears under
its name, it is run in its engine and compared with the network.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cadsurgery.masks import FixedMask, MaskProvider
from cadsurgery.masks.masking import check_image, not_static
from cadsurgery.network.calibration import batch_of, images_to_calibrate
from cadsurgery.network.export.dictionaries import further_inputs, open_call
from cadsurgery.network.export.engine import check_packages
from cadsurgery.network.export.engines import engine_for
from cadsurgery.network.export.shortcuts import without_collections
from cadsurgery.network.export.unsupported import refused
from cadsurgery.network.fidelity_measure import Fidelity
from cadsurgery.network.model import AdaptiveModel, whole_program
from cadsurgery.network.optimized import FLOAT
from cadsurgery.support.errors import InvalidInput, check_name
from cadsurgery.support.files import check_folder, write_whole
from cadsurgery.support.progress import Step, silent

Format = Literal["pt2", "onnx"]
PRECISIONS = (FLOAT, FLOAT16 := "float16", INT8 := "int8")


@dataclass(frozen=True)
class Exported:
    """Result of `export`.

    Attributes:
        file: path of the file.
        format: `pt2` or `onnx`.
        bytes: size of the file, including a separate file of weights.
        image: shape of the image batch; None for axes of any length.
        difference: largest difference from the network on other images, relative to the largest output; for a file in
            8 bits, the difference of the float file it was made from.
        compared: shapes of the batches of the comparison.
        inputs: names of the inputs.
        outputs: names of the outputs.
        multiple: sides of images are multiples of this number of pixels; 1 for any, and for a file for one size.
        fidelity: for a file in 8 bits, its agreement with the float file; else None.
    """

    file: str
    format: str
    bytes: int
    image: tuple[int | None, ...]
    difference: float
    compared: tuple[tuple[int, ...], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    multiple: int = 1
    fidelity: Fidelity | None = None


def export(
    net: AdaptiveModel,
    image: Tensor | dict[str, Any] | list[Any] | tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    to: Format | None = None,
    dynamic: bool = False,
    level_map: bool = False,
    precision: str = FLOAT,
    calibration: Tensor | Iterable[Any] | None = None,
    with_kernels: bool = False,
    fixed_batch: bool = False,
    other: Tensor | None = None,
    check_in: str = "onnx",
    step: Step = silent,
) -> Exported:
    """Write a network as a file that runs without this package.

    The file holds mask, lattice and network in the operations of its engine. Before it appears under its name, it is
    run and compared with the network on other images.

    - `pt2`: a program for `torch.export.load`, for images of one size and a mask that keeps a fixed number of patches,
      such as `"edges | budget:fraction=0.3"`.
    - `onnx`: only standard operations; any mask that depends only on the image, any batch size, optionally any image
      size. Needs `pip install 'cadsurgery[export]'`. The last output, `levels`, is the level map (B, h, w), int8.

    Args:
        net: a network from `adaptify`, in evaluation mode.
        image: an image batch (B, C, H, W) of the file's size, or with `dynamic` an example. For a network that takes
            more, what it is called with: a tuple of arguments, a dictionary of them by name, or a dictionary or list
            that is the only one. Each tensor in them is an input
            of the file by name, the image first; the file is for one size and number of images then. Where images
            calibrate, all else has the example's values; where dictionaries do, each has its own.
        path: file to write.
        to: format; default: `onnx` for a name that ends in `.onnx`, else `pt2`.
        dynamic: accept any height and width; if the network does not, all multiples of `Exported.multiple` (ONNX only).
        level_map: replace the mask by a second input `level_map` (B, h, w), int64; implies `dynamic` (ONNX only).
        precision: `float` keeps that of the network. `float16`: weights and activations in half precision; the mask,
            inputs and outputs in single (ONNX only). `int8`: weights and activations in 8 bits, calibrated; operations
            that the level map depends on stay in float (ONNX only).
        calibration: for `int8`, about 20 to 100 images like those of later calls: a folder of photos, or tensors
            preprocessed for the network, in any form that `network.calibration.read_calibration` lists.
        with_kernels: convolutions of rows, and what else is slow in engines, are this package's kernels, operations of
            the domain `cadsurgery`. The file is faster, and is opened with the library of `cadsurgery.kernels_for`
            only; it is compared with it (ONNX only).
        fixed_batch: take as many images in a call as the example holds, and no others, as compilers for devices ask for
            (an ONNX file takes any number otherwise, a program the example's).
        other: another batch to compare on; default: variants of `image`, e.g. upside down.
        check_in: engine in which an ONNX file is compared: `onnx` (ONNX Runtime) or `openvino`; a file in 8 bits gets
            the form that is fastest in this engine.
        step: progress callback; gets the name of each step: tracing, translating, writing, comparing,
            calibrating and quantising. See `cadsurgery.support.progress.Step`.

    Raises:
        InvalidInput: see `check_mask`; the network is in training mode, the image is invalid or too small an example
            for any size, an option does not apply to the format, or images calibrate nothing or lack for `int8`.
        UnknownName: there is no such precision, format or engine.
        CannotConvert: torch or the engine cannot follow the network or its mask, or the file's outputs differ.
        FileError: the file cannot be written.
        NotInstalled: a package that the format needs is not installed.
    """
    check_calibration(precision, calibration)
    part = "pass what cs.adaptify(...) gave; of a detector, its backbone: cs.adaptify(model.backbone)."
    whole_program(net, "cannot be exported", part)
    net, image, name = open_call(net, image)
    check_image(image)
    _check_image_alone(net)
    assert isinstance(image, Tensor)
    if other is not None:
        check_image(other, "the image to compare on")
    file, dynamic = Path(path), dynamic or level_map
    kind = format_of(file, to)
    engine = engine_for(check_in, with_kernels)
    if kind == "onnx":
        check_packages(engine)
    batches = _to_calibrate(net, calibration, image, dynamic)
    options = {
        "dynamic": dynamic,
        "level_map": level_map,
        "with_kernels": with_kernels,
        precision: precision != FLOAT,
    }
    _check_options(net, kind, name, options)
    check_mask(net.mask, kind, dynamic, level_map)
    if dynamic:
        _check_example(net, image)
    check_folder(file, "path")
    net.normalise_by(image)  # the normalisation must be known before tracing
    advice = "report it with the name of the network; run it where this package is meanwhile, net.optimize()."
    what = "the file cannot be made"
    with (
        torch.no_grad(),
        without_collections(),
        write_whole(file) as temporary,
        refused(what, advice, net),
    ):
        if kind == "onnx":
            from cadsurgery.network.export import onnx  # with torch's exporter, which takes long to import

            how = (dynamic, level_map, precision == FLOAT16, engine, batches, step, name, fixed_batch)
            compared, shape = onnx.write(net, image, other, temporary, *how)
        else:
            from cadsurgery.network.export import programs

            compared, shape = programs.write_program(net, image, other, temporary, step)
            compared = replace(compared, inputs=(name, *further_inputs(net)))
        size = sum(one.stat().st_size for one in temporary.parent.iterdir())
    return Exported(str(file), kind, size, shape, **vars(compared))


def _check_options(net: AdaptiveModel, kind: str, name: str, options: dict[str, bool]) -> None:
    """Refuse options that do not go together, with a format, or with a network whose image has this name.

    Raises:
        InvalidInput: see `export`.
    """
    inputs = (name, *further_inputs(net))
    is_half = options.get(FLOAT16, False)
    if len(inputs) > 1 and (options["dynamic"] or is_half):
        raise InvalidInput(
            f"a file with the inputs {', '.join(inputs)} cannot be dynamic or float16.",
            why="these are for networks that take only an image.",
            next="leave that out.",
        )
    if kind != "onnx" and (unknown := [name for name, value in options.items() if value]):
        raise InvalidInput(
            f"a file of format {kind} cannot be {' or '.join(unknown)}.",
            why="it is made for images of one size, with the types of the network.",
            next='leave that out, or write an ONNX file: to="onnx".',
        )
    if is_half and options["with_kernels"]:
        raise InvalidInput(
            "a file with kernels is in float16.",
            where="with_kernels, --with-kernels",
            why="the kernels compute in float32.",
            next="leave out one of them.",
        )
    if net.training:
        raise InvalidInput("the network is in training mode.", next="call net.eval() first.")


def _check_image_alone(net: AdaptiveModel) -> None:
    """Refuse a network that needs more than an image.

    Raises:
        InvalidInput: it has another input without a default.
    """
    inputs = net.program.signature.parameters.values()
    needed = [
        value.name for value in inputs if value.default is value.empty and value.kind in _PASSED_BY_PLACE
    ]
    if len(needed) > 1:
        raise InvalidInput(
            f"the network takes {', '.join(needed)}, and only the image is given.",
            next="give all that it is called with, as an example: cs.export(net, (image, other), path).",
        )


_PASSED_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _check_example(net: AdaptiveModel, image: Tensor) -> None:
    """Refuse an example for any size that is so small that a map has length one, which torch treats as fixed.

    Raises:
        InvalidInput: the image is too small.
    """
    stride = net.plan.strides[0]
    if min(image.shape[2:]) <= stride:
        raise InvalidInput(
            f"an image of {image.shape[2]} x {image.shape[3]} pixels is too small an example of any size.",
            why=f"it has one sample of output stride {stride} along a side, and a length of one is fixed in the file.",
            next="give a larger image, such as those that the network is for, or write a file for this one size: "
            "dynamic=False.",
        )


def check_calibration(precision: str, calibration: object) -> None:
    """Refuse a precision that files do not have, and images to calibrate by without 8 bits, or the reverse.

    Raises:
        UnknownName, InvalidInput: see `export`.
    """
    check_name("precision", precision, PRECISIONS)
    if (precision == INT8) != (calibration is not None):
        raise InvalidInput(
            f"precision {precision} {'lacks' if calibration is None else 'takes no'} images to calibrate by.",
            why="images without labels show the ranges of values in 8 bits, and of nothing else.",
            next='give both or neither: precision="int8", calibration=images; --precision int8 --calibration FOLDER.',
        )


def _to_calibrate(net: AdaptiveModel, calibration: Any, image: Tensor, dynamic: bool) -> list[Any]:
    """Return the calibration batches, or dictionaries with them; an empty list for None."""
    if calibration is None:
        return []
    batches = images_to_calibrate(net, calibration)
    for batch in map(batch_of, batches):
        check_image(batch, "an image to calibrate by")
        if batch.shape[1:] != image.shape[1:] and not dynamic:
            raise InvalidInput(
                f"the images to calibrate by are {tuple(batch.shape[1:])}, the file is for {tuple(image.shape[1:])}.",
                next="give images of that size, or write a file for any: dynamic=True, --dynamic.",
            )
    return batches


def format_of(file: Path, to: str | None) -> str:
    """Return the requested format, or the format that follows from a file's name.

    Raises:
        InvalidInput: there is no such format.
    """
    kind = to or ("onnx" if file.suffix == ".onnx" else "pt2")
    if kind not in get_args(Format):
        raise InvalidInput(f"to={kind!r} is no format.", next=f"use one of {', '.join(get_args(Format))}.")
    return kind


def check_mask(mask: MaskProvider, kind: str, dynamic: bool, level_map: bool) -> None:
    """Refuse a mask that cannot be exported to a format.

    Raises:
        InvalidInput: the mask depends on more than the image; it is for one image size and the file is for any; or it
            is not static and the file has fixed shapes.
    """
    if level_map:
        return
    elsewhere = (
        "compute the level map yourself and give it to an ONNX file as an input: level_map=True, in Python."
    )
    if mask.dependence:
        raise not_static(mask, "a file is given only the image.", elsewhere)
    if kind != "onnx" and not mask.static:
        fixed = f'keep a fixed share of the patches, mask="{mask.spec()} | budget:fraction=0.3"'
        raise not_static(mask, "the file would have fixed shapes.", f"{fixed}, or write an ONNX file.")
    if dynamic and any(isinstance(part, FixedMask) for part in mask.modules()):
        what = f"mask {mask.spec()} holds a level map for images of one size."
        raise InvalidInput(what, why="the file would be for any size.", next=elsewhere)
