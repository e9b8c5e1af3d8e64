"""Compute a network only in boxes of the picture, with the values of the whole call.

    parts = cs.read_within(net, image, [boxes])

Only the part of the picture that the boxes depend on is computed; see `regions.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from cadsurgery.masks.masking import check_image
from cadsurgery.network.boxes import BOXES, Box, boxes_of, runs_of
from cadsurgery.network.model import AdaptiveModel, whole_program
from cadsurgery.network.regions import ByRows, PictureParts, Values
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import CannotConvert, InvalidInput
from cadsurgery.support.torch_internals import tree_leaves


def read_within(
    net: AdaptiveModel,
    image: Tensor,
    boxes: Sequence[Tensor] | None = None,
    *,
    area: Any = None,
    outside: Any = None,
    mask: object = None,
    output: str | int | None = None,
) -> Any:
    """Return the network's outputs inside boxes or an area, equal to the same parts of the outputs of the whole call.

    Args:
        net: a converted network in evaluation mode, or an inference copy of it, whose outputs are maps.
        image: (B, C, H, W), as for a call.
        boxes: one tensor (n, 4) per image, x0, y0, x1, y1 in image pixels, x1 and y1 excluded; fractions are rounded
            outwards. n may differ between images, and may be 0.
        area: instead of boxes, what is asked for of each image: a map of booleans (h, w) of any size, or (B, h, w); or
            polygons, a list of tensors or arrays (k, 2) with the x and y of their corners in pixels, or for each image
            such a list.
        outside: with `area`, the values of the positions that are not asked for: a number, default NaN, or outputs such
            as a second way gives: of the same structure, each of the same size.
        mask: mask for this call only; it sees the whole picture.
        output: key or position of the output that is asked for, if there are several.

    Returns:
        For each image a list with the outputs in each of its boxes, in the structure of a call: maps
        (1, C, rows, columns). Of a map of another size than the picture, the rows and columns that cover the box.
        With `area` the outputs of a call, with the values of positions that the area reaches.

    Raises:
        InvalidInput: invalid boxes, boxes outside the image or for another number of images, an invalid area; a network
            that is in training mode, or only hosts an adaptive part.
        CannotConvert: an output depends on the whole picture, on its size or on the place in it.
        UnknownName: no such output.
    """
    program = whole_program(net, "cannot be computed in boxes")
    if net.training:
        raise InvalidInput(
            "a network in training mode is not computed in boxes.",
            why="the statistics of a batch depend on every pixel.",
            next="call net.eval() first.",
        )
    check_image(image)
    if (boxes is None) == (area is None):
        raise InvalidInput(
            "boxes and an area are both given."
            if area is not None
            else "neither boxes nor an area are given.",
            next=f"give one of them: {BOXES}, or area=, a map of booleans.",
        )
    if area is None and outside is not None:
        raise InvalidInput("outside= is for an area.", next="give area= in place of boxes, or leave it out.")
    asked = area_of(area, image) if area is not None else None
    given = boxes_of(boxes, image) if asked is None else [boxes_around(one, image) for one in asked]
    with torch.set_grad_enabled(torch.is_grad_enabled() and not program.is_fused):
        run = partial(PictureParts.read, answer=net.answer)
        values = net.in_region(image, given, run, _by_rows, mask, output)
        if asked is None:
            return [[values.contain(part) for part in parts] for parts in values.parts]
        return _on_whole(values, given, asked, outside, image)


def _by_rows(refusal: CannotConvert, rows: ByRows) -> Values:
    """Return the values in boxes by their rows, which are computed in bands where a part of the picture is not enough.

    Raises:
        CannotConvert: `refusal`, if bands are not computed either.
    """
    try:
        return rows.read()
    except (CannotConvert, InvalidInput) as error:
        raise refusal from error


def area_of(area: Any, image: Tensor) -> list[Tensor]:
    """Return what is asked for of each image, a map of booleans of any size.

    Raises:
        InvalidInput: it is no area, or one for another number of images.
    """
    count, (height, width) = len(image), image.shape[2:]
    if isinstance(area, (list, tuple)):
        is_of_images = bool(area) and all(isinstance(one, (list, tuple)) for one in area)
        every = list(area) if is_of_images else [area] * count
        found = [_rasterised(one, (height, width)) for one in every]
    else:
        asked = torch.as_tensor(area) if isinstance(area, (Tensor, np.ndarray)) else None
        if asked is None or asked.dim() not in (2, 3) or asked.dtype != torch.bool or 0 in asked.shape:
            raise InvalidInput(
                f"the area is {describe(area)}.",
                next="give a map of booleans (h, w) or (B, h, w), or a list of polygons (k, 2).",
            )
        asked = asked.detach().cpu()
        found = list(asked) if asked.dim() == 3 else [asked] * count
    if len(found) != count:
        raise InvalidInput(
            f"the area is given for {len(found)} images, and there are {count}.",
            next="give one for each image, or a single one for all.",
        )
    return found


def _rasterised(polygons: Sequence[Any], size: tuple[int, int]) -> Tensor:
    """Return the pixels of an image that polygons cover, their edges among them."""
    canvas = Image.new("1", (size[1], size[0]))
    draw = ImageDraw.Draw(canvas)
    for polygon in polygons:
        corners = None
        with contextlib.suppress(Exception):  # whatever torch refuses
            corners = torch.as_tensor(polygon).detach().cpu().double()
        if corners is None or corners.dim() != 2 or corners.shape[1] != 2 or len(corners) < 3:
            raise InvalidInput(
                f"a polygon is {describe(polygon)}.",
                where="area",
                next="give a tensor or an array (k, 2) of x and y in pixels, of at least three corners.",
            )
        if not bool(corners.isfinite().all()):
            raise InvalidInput("a corner is NaN or infinite.", where="area", next="give x and y in pixels.")
        draw.polygon([(x - 0.5, y - 0.5) for x, y in corners.tolist()], fill=1, outline=1)
    return torch.from_numpy(np.array(canvas, dtype=bool))


def boxes_around(asked: Tensor, image: Tensor) -> list[Box]:
    """Return boxes that cover what is asked for of an image, a map of booleans of any size: runs of blocks."""
    size = image.shape[2], image.shape[3]
    blocks = _on_size(asked, (min(size[0], _BLOCKS), min(size[1], _BLOCKS)))
    shape = blocks.shape[0], blocks.shape[1]
    return [_tight(asked, box.of_map(size, shape), size) for box in runs_of(blocks)]


def _tight(asked: Tensor, box: Box, size: tuple[int, int]) -> Box:
    """Return the part of a box of an image that holds what is asked for in it."""
    own = box.of_map((asked.shape[0], asked.shape[1]), size)
    part = asked[own.top : own.bottom, own.left : own.right]
    rows, columns = part.any(1).nonzero().flatten(), part.any(0).nonzero().flatten()
    if not len(rows):
        return box
    tight = Box(
        own.top + int(rows[0]),
        own.top + int(rows[-1]) + 1,
        own.left + int(columns[0]),
        own.left + int(columns[-1]) + 1,
    ).of_map(size, (asked.shape[0], asked.shape[1]))
    return Box(
        max(tight.top, box.top),
        min(tight.bottom, box.bottom),
        max(tight.left, box.left),
        min(tight.right, box.right),
    )


def _on_size(asked: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the positions of a map of a size that reach into what is asked for."""
    return F.adaptive_max_pool2d(asked.float().unsqueeze(0), size)[0] > 0


def _on_whole(
    values: Values, boxes: Sequence[Sequence[Box]], asked: Sequence[Tensor], outside: Any, image: Tensor
) -> Any:
    """Return outputs of full size with the values of an area, and other values outside of it."""
    found = values.onto(values.blank(len(image)), boxes, (image.shape[2], image.shape[3]))
    for number, (axes, other) in enumerate(
        zip(values.axes, _others(outside, values, len(image)), strict=True)
    ):
        if axes is not None:
            whole = found[number]
            length = whole.shape[axes[0]], whole.shape[axes[1]]
            shape = [length[axes.index(axis)] if axis in axes else 1 for axis in range(1, whole.dim())]
            is_asked = torch.stack([_on_size(one, length).view(shape) for one in asked])
            found[number] = torch.where(is_asked.to(whole.device), whole, other)
    return values.filled(found)


def _others(outside: Any, values: Values, count: int) -> list[Any]:
    """Return the values outside of an area for each output.

    Raises:
        InvalidInput: they do not fit the outputs.
    """
    wholes = tree_leaves(values.whole)
    if outside is None or isinstance(outside, (int, float)):
        for whole in wholes if outside is None else ():
            if isinstance(whole, Tensor) and not whole.is_floating_point():
                raise InvalidInput(
                    f"an output of {whole.dtype} has no NaN for the positions outside of the area.",
                    next="give a number: outside=0.",
                )
        return [
            torch.tensor(float("nan") if outside is None else outside, dtype=whole.dtype, device=whole.device)
            if isinstance(whole, Tensor)
            else None
            for whole in wholes
        ]
    others = tree_leaves(dict(outside) if isinstance(outside, dict) else outside)
    shapes = [(count, *whole.shape[1:]) if isinstance(whole, Tensor) else None for whole in wholes]
    given = [tuple(other.shape) if isinstance(other, Tensor) else None for other in others]
    if given != shapes:
        raise InvalidInput(
            f"outside= has the shapes {given}, and the outputs have {shapes}.",
            next='give a number, or outputs as a call returns them, e.g. net(image, mask="none").',
        )
    pairs = zip(others, wholes, strict=True)
    return [other.to(whole) if isinstance(whole, Tensor) else None for other, whole in pairs]


_BLOCKS = 32  # in whose numbers an area is divided, down and across
