"""Masks with thresholds on a score map: the interpolation error of the entering features, the network's uncertainty
after a first pass with everything downsampled, or its response on a smaller picture.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.axes import as_rows
from cadsurgery.elements.sizes import divide_up
from cadsurgery.masks.context import first_pass_output, preview_output
from cadsurgery.masks.filters import blur, on_samples, resize
from cadsurgery.masks.graded import SteppedMask
from cadsurgery.masks.mask_options import (
    NUMBER,
    WIDTH,
    between,
    check_falling,
    check_options,
    several,
)
from cadsurgery.masks.provider import FineMapSpec, mask_provider
from cadsurgery.support.divergence import class_scores, is_map
from cadsurgery.support.errors import InvalidInput, check_name
from cadsurgery.support.running import running
from cadsurgery.support.torch_internals import tree_leaves

MEASURES = ("margin", "entropy")


class ScoredMask(SteppedMask):
    """Base of masks with thresholds on a score map, which a subclass computes (`scores`).

    Args:
        threshold: the i-th threshold on the scores decides what gets level i; all others get the lowest level.

    Raises:
        InvalidInput: thresholds are NaN or do not fall.
    """

    def __init__(self, threshold: float | tuple[float, ...]) -> None:
        super().__init__()
        self.threshold = several(threshold)
        check_options(self.name, threshold=(self.threshold, NUMBER))
        check_falling(self.name, self.threshold)

    def steps(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> list[Tensor]:
        """Mark where the scores reach each threshold."""
        scores = self.scores(image, features, grid)
        return [scores >= threshold for threshold in self.threshold]


@mask_provider("detail", source="ours; measured in recipes/camvid_mobilenetv2")
class DetailMask(ScoredMask):
    """Keep high where linear interpolation from every second sample has the largest error on the entering features.

    The squared error is summed over channels, smoothed to make kept areas compact, and divided by its mean over the
    image: a threshold of 2 keeps samples with twice the average error. It needs no training and no labels, and costs
    hardly anything.

    Args:
        threshold: on the relative error; several thresholds as in `ScoredMask`.
        sigma: standard deviation of the smoothing, in samples of the fine map; 0 for none.
    """

    ignores_image = True

    bytes_per_pixel = 96

    def __init__(self, threshold: float | tuple[float, ...] = (1.5,), sigma: float = 2.0) -> None:
        super().__init__(threshold)
        check_options("detail", sigma=(sigma, WIDTH))
        self.sigma = sigma

    def scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return the smoothed error relative to its mean over the image."""
        error = blur(interpolation_error(features), self.sigma)
        return error / error.mean((1, 2), keepdim=True).clamp(min=torch.finfo(error.dtype).tiny)


def interpolation_error(features: Tensor) -> Tensor:
    """Compute the squared error of bilinear interpolation from every second sample, summed over channels.

    The result (B, h, w) is at least float32; borders are replicated.
    """
    if running.target and running.target.has_kernels:
        rows = as_rows(features.float())  # as the region's first rows, so that both are one value
        error: Tensor = torch.ops.cadsurgery.interpolation_error(rows, features.shape[0], *features.shape[2:])
        return error
    return missed(features).square().sum(1)


def missed(features: Tensor) -> Tensor:
    """Compute the error of bilinear interpolation of a map (B, C, h, w) from its every second sample.

    The result has the map's shape and is at least float32; borders are replicated.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    height, width = features.shape[2:]
    every_second = features[..., ::2, ::2]
    rows, columns = every_second.shape[2:]
    size = (2 * rows - 1, 2 * columns - 1)
    between = F.interpolate(every_second, size=size, mode="bilinear", align_corners=True)
    interpolated = F.pad(between, (0, width - size[1], 0, height - size[0]), mode="replicate")
    return features - interpolated


@mask_provider(
    "confidence", source="ours, after confidence-adaptive prediction (Liu et al., ICLR 2022)", of_recipes=True
)
class ConfidenceMask(ScoredMask):
    """Keep high where the network is unsure after a first pass with everything downsampled.

    The pass begins where the region begins; layers before it run once. Its work counts as the mask's.

    Args:
        threshold: on the uncertainty, 0..1; several thresholds as in `ScoredMask`.
        measure: measure of uncertainty: `margin`, one minus the difference of the two largest probabilities, or
            `entropy`, divided by its largest possible value.
        sigma: standard deviation of the smoothing, in samples of the fine map; 0 for none.

    Raises:
        UnknownName: there is no such measure.
        InvalidInput: thresholds as in `ScoredMask`, or a sigma out of range.
    """

    image_only = ignores_image = True
    needs = "a first pass of the network"

    def __init__(
        self, threshold: float | tuple[float, ...] = (0.5,), measure: str = "margin", sigma: float = 1.0
    ) -> None:
        super().__init__(threshold)
        self.measure, self.sigma = measure, sigma
        check_name("measure of mask 'confidence'", measure, MEASURES)
        check_options("confidence", sigma=(sigma, WIDTH))

    def first_passes(self, lowest: int) -> frozenset[int]:
        """Return the lowest level."""
        return frozenset({lowest})

    def scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Compute the network's uncertainty, resized to the fine map and smoothed.

        Raises:
            InvalidInput: the network does not return a map of class scores.
        """
        where = "mask confidence"
        output, advice = first_pass_output(where), "choose another mask, e.g. detail or edges."
        scores = class_scores(output, fewest=2, batch=grid.batch, where=where, next=advice)
        return blur(resize(_uncertainty(scores, self.measure), grid.size), self.sigma)


def _uncertainty(logits: Tensor, measure: str) -> Tensor:
    """Compute the uncertainty (B, H, W), in 0..1, of class scores (B, C, H, W)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if measure == "entropy":
        logs = logits.log_softmax(1)
        return -(logs.exp() * logs).sum(1) / math.log(logits.shape[1])
    best = logits.softmax(1).topk(2, dim=1).values
    return 1 - (best[:, 0] - best[:, 1])


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
    maps = [leaf for leaf in tree_leaves(output) if is_map(leaf, batch)]
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
