"""Masks that keep high the patches where downsampling would change the network's output most.

`oracle` measures the change by running the network at every level; `gain` predicts it with a small network. Both have
their names where this file is imported: `cs.adaptify(model, "gain | budget:fraction=0.1")`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cadsurgery.masks.context import first_pass_outputs
from cadsurgery.masks.filters import blur, mean_of_patches, on_samples, resize
from cadsurgery.masks.learned import EstimatedMask
from cadsurgery.masks.mask_options import NUMBER, WIDTH, check_options
from cadsurgery.masks.provider import FineMapSpec, MaskProvider, mask_provider
from cadsurgery.masks.scored import missed
from cadsurgery.support.divergence import divergence


class LossMask(MaskProvider):
    """Base of masks that estimate the loss of each patch at each level below the high one (`losses`).

    Each patch gets the lowest level whose loss is within the tolerance; budgets rank patches by the loss at the lowest
    level. Losses are smoothed, because a kept patch gains from kept neighbours.

    Args:
        tolerance: accepted divergence (`cadsurgery.support.divergence`); for class scores in nats per pixel.
        sigma: standard deviation of the smoothing, in samples of the fine map; 0 for none.
    """

    tolerance: float
    sigma: float

    def losses(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Compute the losses (B, lowest level, ceil(h / patch), ceil(w / patch)), for levels from 1 on.

        A loss is the mean divergence per pixel from the output with everything high.
        """
        raise NotImplementedError

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return (B, h, w) int64: for each patch the lowest level whose loss is within the tolerance."""
        losses = self.smooth(self.losses(image, features, grid), grid)
        levels = torch.arange(1, losses.shape[1] + 1, device=losses.device)[:, None, None]
        return on_samples(((losses <= self.tolerance) * levels).amax(1), grid.patch, grid.size)

    def scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return the loss of each patch at the lowest level."""
        losses = self.smooth(self.losses(image, features, grid), grid)
        return on_samples(losses[:, -1], grid.patch, grid.size)

    def smooth(self, losses: Tensor, grid: FineMapSpec) -> Tensor:
        """Smooth the losses on the fine map and average them over patches again."""
        if self.sigma == 0:
            return losses
        samples = on_samples(losses, grid.patch, grid.size)
        smoothed = blur(samples.flatten(0, 1), self.sigma).view_as(samples)
        return mean_of_patches(smoothed, grid.patch)


@mask_provider("oracle", source="ours")
class OracleMask(LossMask):
    """Keep high where the network's output changes most: an upper bound, as it runs the network at every level.

    Each level's output is compared with the output of everything high, pixel by pixel. All these passes count as the
    mask's work; they begin where the region begins.

    Args:
        tolerance: as in `LossMask`.
        sigma: as in `LossMask`.

    Raises:
        InvalidInput: a tolerance that is NaN, a sigma out of range, or network outputs that are not maps.
    """

    image_only = ignores_image = True
    needs = "passes of the network at every level"

    def __init__(self, tolerance: float = 0.02, sigma: float = 2.0) -> None:
        super().__init__()
        check_options("oracle", tolerance=(tolerance, NUMBER), sigma=(sigma, WIDTH))
        self.tolerance, self.sigma = tolerance, sigma

    def first_passes(self, lowest: int) -> frozenset[int]:
        """Return all levels."""
        return frozenset(range(lowest + 1))

    def losses(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Measure the losses on the outputs of the first passes."""
        outputs = first_pass_outputs("mask oracle")
        maps = [
            resize(divergence(outputs[0], outputs[level]), grid.size)
            for level in range(1, grid.max_level + 1)
        ]
        return mean_of_patches(torch.stack(maps, 1), grid.patch)


@mask_provider("gain", source="ours; recipes/voc_deeplab")
class GainMask(EstimatedMask, LossMask):
    """Keep high where a small network, fitted to unlabelled images (`fit_gain`), predicts that the
    output changes most.

    Its inputs, per patch and channel of the entering features, are the mean and the error of linear interpolation from
    every second sample. It runs on patches only, so it costs hardly anything: convolutions 1x1, 3x3, 3x3, 1x1. Before
    fitting it ranks patches as `detail` does.

    Args:
        tolerance: as in `LossMask`.
        sigma: as in `LossMask`.
        channels: channels of the three hidden convolutions; at most 4096.
        seed: seed of the initial weights, 0 or more.

    Raises:
        InvalidInput: a value out of range.
    """

    kernels, places, per_channel, first_level = (1, 3, 3, 1), (0, 2, 4, 6), 2, 1

    def __init__(
        self,
        tolerance: float = 0.02,
        sigma: float = 2.0,
        channels: int | tuple[int, ...] = (48, 48, 32),
        seed: int = 0,
    ) -> None:
        super().__init__(channels, seed)
        check_options("gain", tolerance=(tolerance, NUMBER), sigma=(sigma, WIDTH))
        self.tolerance, self.sigma = tolerance, sigma
        self.detail: Tensor
        self.register_buffer("detail", torch.ones(()))  # weight of `detail`: 1 before fitting

    def assemble(self, convolutions: list[nn.Conv2d], device: torch.device) -> nn.Sequential:
        """Build the estimator; the second 3x3 convolution is dilated, and the last one starts at zero."""
        first, two, three, last = convolutions
        three.dilation = three.padding = (2, 2)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        return nn.Sequential(first, nn.ReLU(), two, nn.ReLU(), three, nn.ReLU(), last)

    def losses(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Predict the losses from the features."""
        self.require(features, grid)
        return self.expect(self.describe(features, grid.patch))

    def restart(self, seed: int) -> None:
        """Discard the learned weights and initialise the same layers again from `seed`, before fitting."""
        first, *_, last = (layer for layer in self.estimator if isinstance(layer, nn.Conv2d))
        self.seed, self.estimator = seed, nn.Sequential()
        self._make(first.in_channels, last.out_channels, first.weight.device)
        self.detail.zero_()

    def describe(self, features: Tensor, patch: int) -> Tensor:
        """Compute the inputs of the estimator, (B, 2 C, ceil(h / patch), ceil(w / patch)), at least float32.

        The first C channels are the mean of each patch, the other C the root mean square of its interpolation error.
        """
        error = missed(features)
        return torch.cat(
            [mean_of_patches(features.to(error), patch), mean_of_patches(error.square(), patch).sqrt()], 1
        )

    def expect(self, described: Tensor) -> Tensor:
        """Predict the losses (B, lowest level, ...) of patches from the result of `describe`."""
        logs = self.estimator(described.to(next(self.estimator.parameters()).dtype)).to(described)
        error = described[:, described.shape[1] // 2 :].square().sum(1, keepdim=True)
        return (logs + self.detail.to(described) * error.clamp(min=torch.finfo(error.dtype).tiny).log()).exp()
