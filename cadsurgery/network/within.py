"""Compute a network only in boxes of the picture, with the values of the whole call.

    parts = cs.read_within(net, image, [boxes])

Only the part of the picture that the boxes depend on is computed; see `regions.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cadsurgery.masks.masking import check_image
from cadsurgery.network.model import AdaptiveModel, whole_program
from cadsurgery.network.regions import Box
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import InvalidInput


def read_within(
    net: AdaptiveModel,
    image: Tensor,
    boxes: Sequence[Tensor],
    *,
    mask: object = None,
    output: str | int | None = None,
) -> list[list[Any]]:
    """Return the network's outputs inside boxes, equal to the same parts of the outputs of the whole call.

    Args:
        net: a converted network in evaluation mode, or an inference copy of it, whose outputs are maps.
        image: (B, C, H, W), as for a call.
        boxes: one tensor (n, 4) per image, x0, y0, x1, y1 in image pixels, x1 and y1 excluded; fractions are rounded
            outwards. n may differ between images, and may be 0.
        mask: mask for this call only; it sees the whole picture.
        output: key or position of the output that is asked for, if there are several.

    Returns:
        For each image a list with the outputs in each of its boxes, in the structure of a call: maps
        (1, C, rows, columns). Of a map of another size than the picture, the rows and columns that cover the box.

    Raises:
        InvalidInput: invalid boxes, boxes outside the image or for another number of images; a network that is in
            training mode, or only hosts an adaptive part.
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
    given = boxes_of(boxes, image)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not program.is_fused):
        return net.in_region(image, given, lambda region: region.read(net.answer, output), mask, output)


def boxes_of(boxes: Any, image: Tensor) -> list[list[Box]]:
    """Return boxes in whole pixels, for each image.

    Raises:
        InvalidInput: they are no boxes, are for another number of images, or reach beyond the image.
    """
    if isinstance(boxes, Tensor) and boxes.dim() == 2 and len(image) == 1:
        boxes = [boxes]
    if not isinstance(boxes, (list, tuple)) and not (isinstance(boxes, Tensor) and boxes.dim() == 3):
        raise InvalidInput(f"boxes are {describe(boxes)}.", next=f"give {_BOXES}.")
    if len(boxes) != len(image):
        raise InvalidInput(
            f"boxes are given for {len(boxes)} images, and there are {len(image)}.", next=f"give {_BOXES}."
        )
    return [_boxes_in(of_image, number, image) for number, of_image in enumerate(boxes)]


_BOXES = "a list with a tensor (n, 4) of x0, y0, x1, y1 in pixels for each image"


def _boxes_in(boxes: Any, number: int, image: Tensor) -> list[Box]:
    height, width = image.shape[2:]
    where = f"boxes of image {number}"
    try:
        given = torch.as_tensor(boxes)
    except Exception as error:  # whatever torch refuses
        raise InvalidInput(f"they are {describe(boxes)}.", where=where, next=f"give {_BOXES}.") from error
    if given.numel() == 0:
        return []
    if given.dim() != 2 or given.shape[1] != 4 or given.is_complex() or given.dtype == torch.bool:
        raise InvalidInput(f"they are {describe(boxes)}.", where=where, next=f"give {_BOXES}.")
    given = given.detach().cpu().double()
    if not bool(given.isfinite().all()):
        raise InvalidInput("a coordinate is NaN or infinite.", where=where, next=f"give {_BOXES}.")
    found = []
    for x0, y0, x1, y1 in given.tolist():
        text = f"({x0:g}, {y0:g}, {x1:g}, {y1:g})"
        if x1 < x0 or y1 < y0:
            raise InvalidInput(
                f"the box {text} ends before it begins.",
                where=where,
                why="boxes are x0, y0, x1, y1: left, top, right, bottom.",
                next="exchange its corners; x, y, width, height become x, y, x + width, y + height.",
            )
        if min(x0, y0) < 0 or x1 > width or y1 > height:
            raise InvalidInput(
                f"the box {text} reaches beyond the image, which has {width} x {height} pixels.",
                where=where,
                next="cut it at the border: boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height).",
            )
        left, top = math.floor(x0), math.floor(y0)
        right, bottom = (math.ceil(x1) if x1 > x0 else left), (math.ceil(y1) if y1 > y0 else top)
        found.append(Box(top, bottom, left, right))
    return found
