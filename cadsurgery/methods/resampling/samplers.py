"""Samplers: they compute where an image is sampled, from labels, a mask, a trained network, or uniformly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadsurgery.elements.sizes import divide_up
from cadsurgery.masks import FineMapSpec, FixedMask, MaskProvider, Normalisation, resolve_mask
from cadsurgery.masks.context import labels_of
from cadsurgery.masks.provider import check_scores
from cadsurgery.masks.unit import Unit
from cadsurgery.methods.resampling.locations import (
    IGNORED,
    TARGETS,
    boundaries,
    check_grid,
    normalise,
    target_locations,
    uniform_locations,
)
from cadsurgery.methods.resampling.report import conv_macs
from cadsurgery.methods.resampling.shifts import ShiftNet
from cadsurgery.support.counting import MacCounter
from cadsurgery.support.defaults import DEFAULT_MASK
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import InvalidInput, UnknownName

_STRIDE = 4  # image pixels per score of a mask
_LEVELS = 2  # levels for which masks may have thresholds
_PER_LOCATION = 8  # side in pixels of the learned sampler's input, per location


@dataclass(frozen=True)
class SamplerOptions:
    """Options of a sampler.

    Attributes:
        grid: number of locations per side.
        smoothness: smoothness of `target_locations`, for labels, masks and the targets of a learned sampler.
        targets: classes whose boundaries attract samples; None for all.
        ignore: label of pixels that form no boundary; None for none.
        share: for a mask, the share of samples that count as boundaries: those with the highest scores.
    """

    grid: int = 8
    smoothness: float = 1.0
    targets: tuple[int, ...] | None = tuple(TARGETS)
    ignore: int | None = IGNORED
    share: float = 0.05

    def __post_init__(self) -> None:
        check_grid(self.grid)
        if not self.smoothness >= 0:
            raise InvalidInput(f"smoothness={self.smoothness}.", next="it must be 0 or more.")
        if not 0 < self.share <= 1:
            raise InvalidInput(f"share={self.share}.", next="it must be above 0 and at most 1.")

    def locations_of(self, labels: Tensor) -> Tensor:
        """Compute locations (B, grid, grid, 2) near the boundaries of target classes in labels (B, H, W)."""
        return target_locations(boundaries(labels, self.targets, self.ignore), self.grid, self.smoothness)


class Sampler(nn.Module):
    """Base of all samplers. They map an image batch (B, C, H, W), as the network takes it, to (B, grid, grid, 2)."""

    name: ClassVar[str] = ""

    def __init__(self, options: SamplerOptions) -> None:
        super().__init__()
        self.options = options

    def forward(self, image: Tensor) -> Tensor:
        """Compute the locations."""
        raise NotImplementedError

    def spec(self) -> str:
        """Return the text from which `cadsurgery.resample` creates the sampler."""
        return self.name

    def macs(self, image: Tensor) -> int:
        """Count the multiply-accumulates of the sampler's convolutions."""
        return 0


class UniformSampler(Sampler):
    """Samples at equal distances: the image is downsampled."""

    name = "uniform"

    def forward(self, image: Tensor) -> Tensor:
        """Return the uniform grid."""
        uniform = uniform_locations(self.options.grid).to(image.device)
        return uniform.expand(image.shape[0], -1, -1, -1)


class LabelSampler(Sampler):
    """Locations from given labels (`cadsurgery.masks.labelled`): the targets of a learned sampler."""

    name = "labels"

    def forward(self, image: Tensor) -> Tensor:
        """Compute locations near the boundaries of the call's labels.

        Raises:
            InvalidInput: there are no labels, or their size differs from the image's.
        """
        return self.options.locations_of(labels_of(image, 'sampler "labels"'))


class MaskSampler(Sampler):
    """Locations near the highest scores of a mask, without training or labels.

    The features that the mask sees are the image, averaged over cells of 4 x 4 pixels; these cells are its fine map.
    """

    name = "mask"

    def __init__(self, options: SamplerOptions, mask: MaskProvider, unit: Unit | None = None) -> None:
        """Take a mask and the unit in which it sees the image.

        Raises:
            InvalidInput: the mask uses outputs of the network or was trained on its features.
        """
        super().__init__(options)
        learned = mask.sees_features and any(True for _ in mask.parameters())
        if mask.looks_ahead or learned:
            raise InvalidInput(
                f"mask {mask.spec()} cannot say where to sample.",
                why="it looks at a network's own features or output, and the image is sampled before the network.",
                next='choose a mask that looks at the image, e.g. "edges", or sampler="learned".',
            )
        self.mask, self.unit = mask, unit or Unit()

    def forward(self, image: Tensor) -> Tensor:
        """Compute `target_locations` for the samples with the highest scores."""
        scores = self._scores(image)
        values = scores.flatten(1)
        number = max(1, math.ceil(self.options.share * values.shape[1]))
        least = values.topk(number, 1).values[:, -1:]
        marked = (values >= least) & (values > values.amin(1, keepdim=True))  # none if all scores are equal
        return target_locations(marked.view_as(scores), self.options.grid, self.options.smoothness)

    @torch.no_grad()
    def _scores(self, image: Tensor) -> Tensor:
        stride = _STRIDE if min(image.shape[2:]) > _STRIDE else 1
        size = (divide_up(image.shape[2], stride), divide_up(image.shape[3], stride))
        grid = FineMapSpec(image.shape[0], size, stride, _LEVELS, 2**_LEVELS, 2**_LEVELS)
        image = image if image.is_floating_point() else image.to(torch.get_default_dtype())
        shown = self.unit(image) if self.mask.sees_image else image
        features = F.avg_pool2d(image, stride, ceil_mode=True)
        return check_scores(self.mask.scores(shown, features, grid), grid, self.mask.name, "of a sampler")

    def macs(self, image: Tensor) -> int:
        """Count the MACs of the mask's convolutions."""
        image = torch.zeros(image.shape, dtype=image.dtype) if image.is_meta else image
        with MacCounter() as counter:
            self._scores(image)
        return counter.macs

    def spec(self) -> str:
        """Return the mask's text form."""
        return self.mask.spec()


class LearnedSampler(Sampler):
    """A small network that predicts each location's offset from a mean location, on an image of 8 x 8 pixels per
    location.

    As published, it is MobileNetV2 at a quarter of the width, and the mean locations are learned and start uniform.
    The last layer starts at zero, so that sampling starts with the uniform grid.
    """

    name = "learned"

    def __init__(self, options: SamplerOptions, channels: int = 3) -> None:
        super().__init__(options)
        self.net = ShiftNet(channels)
        nn.init.zeros_(self.net.last.weight)
        assert self.net.last.bias is not None
        nn.init.zeros_(self.net.last.bias)
        self.mean_locations = nn.Parameter(uniform_locations(options.grid).float().unsqueeze(0))

    def forward(self, image: Tensor) -> Tensor:
        """Predict the locations, with the grid's sides on the image's."""
        return normalise(self.predict(image))

    def predict(self, image: Tensor) -> Tensor:
        """Predict (B, grid, grid, 2) without normalisation, as used in training."""
        side = _PER_LOCATION * self.options.grid
        small = F.interpolate(
            image.to(self.mean_locations.dtype), size=(side, side), mode="bilinear", align_corners=False
        )
        return self.net(small).permute(0, 2, 3, 1) + self.mean_locations

    def macs(self, image: Tensor) -> int:
        """Count the MACs of the network."""
        side = _PER_LOCATION * self.options.grid
        return conv_macs(self.net, image.new_empty(image.shape[0], image.shape[1], side, side, device="meta"))


SAMPLERS: dict[str, type[Sampler]] = {
    kind.name: kind for kind in (UniformSampler, LabelSampler, LearnedSampler)
}


def resolve_sampler(
    sampler: object, options: SamplerOptions, channels: int = 3, normalisation: Normalisation | None = None
) -> Sampler:
    """Create a sampler from a name or a mask, or return a sampler unchanged.

    Args:
        sampler: `learned`, `labels`, `uniform`, anything `adaptify` accepts as a mask, or a sampler, which keeps its
            own options.
        options: options of a new sampler.
        channels: channels of the image.
        normalisation: normalisation of the image for masks, if known.

    Raises:
        UnknownName: there is no such sampler or mask.
        InvalidInput: the type is wrong, or the mask cannot be used for sampling.
    """
    if isinstance(sampler, Sampler):
        return sampler
    if sampler == LearnedSampler.name:
        return LearnedSampler(options, channels)
    if isinstance(sampler, str) and sampler in SAMPLERS:
        return SAMPLERS[sampler](options)
    try:
        mask = resolve_mask(sampler)
    except UnknownName as error:
        hint = f"a sampler is {', '.join(sorted(SAMPLERS))}, or a mask."
        raise (
            UnknownName("sampler", str(sampler), [*SAMPLERS, DEFAULT_MASK], next=hint)
            if ":" not in str(sampler)
            else error
        ) from None
    except InvalidInput as error:
        if isinstance(sampler, str):
            raise
        raise InvalidInput(
            f"{describe(sampler)} is not a sampler.",
            next='give "learned", "labels", "uniform", a mask such as "edges", or a sampler.',
        ) from error
    if isinstance(mask, FixedMask):
        raise InvalidInput(
            "a tensor cannot say where to sample.",
            why="a sampler is used for images of any size.",
            next="give a function image -> map, or labels: sampler='labels' within cadsurgery.masks.labelled.",
        )
    return MaskSampler(options, mask, Unit(normalisation))
