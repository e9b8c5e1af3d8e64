"""Mask `preview`: the network itself, on a smaller picture, says where something is."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.sizes import divide_up
from cadsurgery.masks.context import preview_output
from cadsurgery.masks.filters import on_samples
from cadsurgery.masks.mask_options import between, check_options
from cadsurgery.masks.provider import FineMapSpec, mask_provider
from cadsurgery.masks.scored import ScoredMask
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.torch_internals import tree_leaves


@mask_provider("preview", source="ours; measured by benchmarks/empty_pages.py")
class PreviewMask(ScoredMask):
    """Keep the cells in which the network responds on a smaller picture, and the cells around them.

    The network as given runs on the picture at `scale` of its sides, which takes about the square of it in
    multiply-accumulates (.14 of them for .375). A response is how far a value of its output maps is from the
    median of its channel, as a share of the farthest in the picture.

    Args:
        threshold: on the response, 0 to 1; several thresholds as in `ScoredMask`.
        scale: side of the smaller picture, as a share of the picture's.
        margin: cells of the lowest resolution kept around.
        least: smallest distance from the median that counts as the farthest, in the unit of the output: on pictures in
            which nothing is, what is less responds to noise.
    """

    image_only = ignores_image = True
    needs = "a preview of the network"

    def __init__(
        self,
        threshold: float | tuple[float, ...] = (0.1,),
        scale: float = 0.375,
        margin: int = 1,
        least: float = 0.0,
    ) -> None:
        super().__init__(threshold)
        checked = {"scale": (scale, between(0.01, 1, "0.375")), "margin": (margin, between(0, math.inf, "1"))}
        check_options("preview", **checked, least=(least, between(0, math.inf, "0.05")))
        self.scale, self.margin, self.least = scale, margin, least

    @property
    def preview_scale(self) -> float | None:
        """Side of the smaller picture, as a share of the picture's."""
        return self.scale

    def scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return the largest response in each cell of the lowest resolution and around it, repeated on its samples.

        Raises:
            InvalidInput: the network gives no map of numbers.
        """
        maps = _maps_of(preview_output("mask preview"), grid.batch)
        cells = torch.stack([_by_cell(_response(each, self.least), grid) for each in maps]).amax(0)
        if self.margin:
            cells = F.max_pool2d(cells, 2 * self.margin + 1, 1, self.margin)
        return on_samples(cells, grid.side, grid.size)


def _maps_of(output: Any, batch: int) -> list[Tensor]:
    """Return the maps (B, C, h, w) among the outputs of a network."""
    maps = [
        leaf
        for leaf in tree_leaves(output)
        if isinstance(leaf, Tensor) and leaf.dim() == 4 and leaf.is_floating_point() and len(leaf) == batch
    ]
    if not maps:
        raise InvalidInput(
            "the network gives no map (batch, channels, height, width) of numbers.",
            where="mask preview",
            why="the mask looks where its output differs from the rest of the picture.",
            next="choose a mask that looks at the picture, e.g. content or edges.",
        )
    return maps


def _response(values: Tensor, least: float) -> Tensor:
    """Return how far each position (B, h, w) is from the medians of its channels, as a share of the farthest."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    usual = values.flatten(2).median(2).values
    distance = (values - usual[:, :, None, None]).abs().amax(1)
    farthest = distance.amax((1, 2), keepdim=True).clamp(min=max(least, torch.finfo(distance.dtype).tiny))
    return distance / farthest


def _by_cell(response: Tensor, grid: FineMapSpec) -> Tensor:
    """Return the largest response in each cell of the lowest resolution, (B, rows, columns)."""
    cells = [divide_up(length, grid.side) for length in grid.size]
    whole = [
        max(many, round(length * many * grid.side / fine))
        for length, many, fine in zip(response.shape[1:], cells, grid.size, strict=True)
    ]
    padding = (0, whole[1] - response.shape[2], 0, whole[0] - response.shape[1])
    widened = F.pad(response.unsqueeze(1), [max(0, amount) for amount in padding], mode="replicate")
    return F.adaptive_max_pool2d(widened, cells).squeeze(1)
