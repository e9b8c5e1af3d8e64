"""Networks for where this package is not: programs of torch.export, packages of AOTInductor, ONNX files.

In come an adaptive network and an image; out comes a file that holds mask, lattice and network, read back by the engine
it is for and compared with the network before it appears under its name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cadsurgery.masks.masking import check_image, not_static
from cadsurgery.network.export import onnx, programs
from cadsurgery.network.export.compare import Comparison
from cadsurgery.network.export.int8 import Fidelity
from cadsurgery.network.model import AdaptiveModel, whole_program
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.files import check_folder, write_together

Format = Literal["pt2", "onnx", "aoti"]


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        file: its path.
        format: `pt2`, `onnx` or `aoti`.
        bytes: its size, that of a file of weights beside it included.
        image: shape of the image batch it takes; None for axes that may have any length.
        difference: largest difference from the network on other images, relative to the largest output.
        compared: the shapes of the batches it was compared on.
        inputs: names of its inputs.
        outputs: names of its outputs.
        fidelity: of a file in 8 bits how near it is to the float file, whose `difference` stands here.
    """

    file: str
    format: str
    bytes: int
    image: tuple[int | None, ...]
    difference: float
    compared: tuple[tuple[int, ...], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    fidelity: Fidelity | None = None


def export(
    net: AdaptiveModel,
    image: Tensor,
    path: str | os.PathLike[str],
    *,
    to: Format | None = None,
    dynamic: bool = False,
    level_map: bool = False,
    float16: bool = False,
    int8: Tensor | Iterable[Tensor] | None = None,
    other: Tensor | None = None,
) -> Exported:
    """Write a network as a file that runs without this package.

    The file holds mask, lattice and network in the operations of its engine. It is read back and compared with the
    network on other images before it appears under its name.

    - `pt2`: a program for `torch.export.load`, for images of one size and a mask that keeps a fixed number of patches,
      such as `"edges | budget:fraction=0.3"`.
    - `aoti`: the same compiled by AOTInductor for the machine it is made on: `torch._inductor.aoti_load_package` in
      Python, `AOTIModelPackageLoader` in C++.
    - `onnx`: standard operations alone; also for any size of images, batch and mask. Needs
      `pip install 'cadsurgery[export]'`. Its last output, `levels`, is the level map (B, h, w), int8.

    Args:
        net: what `adaptify` gave, in evaluation mode.
        image: an image batch (B, C, H, W) of the size the file is for, or with `dynamic` an example.
        path: file to write.
        to: format; default: `onnx` for a name that ends so, else `pt2`.
        dynamic: any batch, height and width; the mask may keep any number of patches. ONNX.
        level_map: a second input of this name (B, h, w), int64, takes the place of the mask; dynamic.
        float16: weights and features in half precision, the mask and what goes in and comes out in single. ONNX.
        int8: image batches like those that the network will see, some 20 to 100 images: weights and features are rounded
            to 8 bits, in ranges that these show. What the level map depends on stays as it is. ONNX.
        other: another batch to compare on; default: `image` turned upside down and more like it.

    Raises:
        InvalidInput: the mask is not static though the file would be, the network is in training mode, the image is
            none, or an option is of another format.
        CannotConvert: torch or the engine cannot follow the network or its mask, or the file gives something else.
        FileError: the file cannot be written.
        CadError: a package that the format needs is not installed.
    """
    check_image(image)
    if other is not None:
        check_image(other, "the image to compare on")
    file, dynamic = Path(path), dynamic or level_map
    kind = to or ("onnx" if file.suffix == ".onnx" else "pt2")
    if kind not in get_args(Format):
        raise InvalidInput(f"to={kind!r} is no format.", next=f"use one of {', '.join(get_args(Format))}.")
    batches = _to_calibrate(int8, image, dynamic)
    wanted = {"dynamic": dynamic, "level_map": level_map, "float16": float16, "int8": bool(batches)}
    if kind != "onnx" and (unknown := [name for name, value in wanted.items() if value]):
        raise InvalidInput(
            f"a file of format {kind} cannot be {' or '.join(unknown)}.",
            why="it is made for images of one size, with the types of the network.",
            next='leave that out, or write an ONNX file: to="onnx".',
        )
    if float16 and batches:
        raise InvalidInput("a file is of float16 or int8.", next="leave out one of them.")
    if kind == "aoti" and file.suffix != ".pt2":
        raise InvalidInput(
            f"a package of AOTInductor cannot be called {file.name}.",
            next="name it .pt2, as its loaders expect.",
        )
    part = "pass what cs.adaptify(...) gave; of a detector, its backbone: cs.adaptify(model.backbone)."
    whole_program(net, "cannot be exported", part)
    if net.training:
        raise InvalidInput("the network is in training mode.", next="call net.eval() first.")
    if not dynamic and not net.mask.static:
        raise not_static(net.mask, "the file would have fixed shapes.", next=_way_round(net, kind))
    if dynamic and not level_map and net.mask.dependence:
        raise InvalidInput(
            f"mask {net.mask.spec()} depends on {net.mask.dependence}, which a file is not given.",
            next="compute the level map yourself and give it as an input: level_map=True, --level-map.",
        )
    check_folder(file, "path")
    writers: dict[str, Callable[[Path], tuple[Comparison, tuple[int | None, ...]]]] = {
        "pt2": lambda there: programs.write_program(net, image, other, there),
        "aoti": lambda there: programs.write_package(net, image, other, there),
        "onnx": lambda there: onnx.write(net, image, other, there, dynamic, level_map, float16, batches),
    }
    with torch.no_grad(), write_together(file) as temporary:
        compared, shape = writers[kind](temporary)
        size = sum(one.stat().st_size for one in temporary.parent.iterdir())
    return Exported(str(file), kind, size, shape, **vars(compared))


def _to_calibrate(int8: Any, image: Tensor, dynamic: bool) -> list[Tensor]:
    """The batches to calibrate by; none if there is nothing to calibrate."""
    if int8 is None:
        return []
    batches = [int8] if isinstance(int8, Tensor) else list(int8)
    if not batches:
        raise InvalidInput(
            "int8 has no images.", next="give some image batches (B, C, H, W) to calibrate by."
        )
    for batch in batches:
        check_image(batch, "an image of int8")
        if batch.shape[1:] != image.shape[1:] and not dynamic:
            raise InvalidInput(
                f"int8 has images of {tuple(batch.shape[1:])}, the file is for {tuple(image.shape[1:])}.",
                next="give images of that size, or write a file for any: dynamic=True, --dynamic.",
            )
    return batches


def _way_round(net: AdaptiveModel, kind: str) -> str:
    """What to do with a mask that is not static; empty for what helps wherever shapes are fixed."""
    if kind != "onnx":
        return ""
    given = "give the level map as an input: level_map=True, --level-map."
    return (
        given
        if net.mask.dependence
        else f"write a file for any mask and size, dynamic=True or --dynamic; or {given}"
    )
