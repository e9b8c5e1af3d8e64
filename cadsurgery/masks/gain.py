"""Masks that keep high what the network's output would lose most: the loss itself, which only running the network twice
tells, and what a small network on the entering features expects of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cadsurgery.masks.context import first_pass_outputs
from cadsurgery.masks.filters import blur, mean_of_patches, on_samples, resize
from cadsurgery.masks.learned import EstimatedMask
from cadsurgery.masks.options import NUMBER, WIDTH, check_options
from cadsurgery.masks.provider import FineMapSpec, MaskProvider, mask_provider
from cadsurgery.masks.scored import missed
from cadsurgery.support.divergence import divergence


class LossMask(MaskProvider):
    """Base of masks that know, or expect, what each patch loses at each level below the high one (`losses`): each gets
    the lowest level that loses no more than the tolerance. Budgets rank by the loss at the lowest level.

    Losses are smoothed: what is kept gains from what is kept beside it.

    Args:
        tolerance: divergence that may be lost, see `cadsurgery.support.divergence`: of class scores in nats per pixel.
        sigma: standard deviation of the smoothing, in samples of the fine map; 0 for none.
    """

    tolerance: float
    sigma: float

    def losses(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """(B, lowest level, ceil(h / patch), ceil(w / patch)): mean divergence per pixel from everything high, by level
        from 1 on."""
        raise NotImplementedError

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """(B, h, w) int64: the lowest level within the tolerance in each patch."""
        losses = self.smooth(self.losses(image, features, grid), grid)
        levels = torch.arange(1, losses.shape[1] + 1, device=losses.device)[:, None, None]
        return on_samples(((losses <= self.tolerance) * levels).amax(1), grid.patch, grid.size)

    def scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return the loss of each patch at the lowest level."""
        losses = self.smooth(self.losses(image, features, grid), grid)
        return on_samples(losses[:, -1], grid.patch, grid.size)

    def smooth(self, losses: Tensor, grid: FineMapSpec) -> Tensor:
        """Losses smoothed on the fine map, then of patches again."""
        if self.sigma == 0:
            return losses
        samples = on_samples(losses, grid.patch, grid.size)
        smoothed = blur(samples.flatten(0, 1), self.sigma).view_as(samples)
        return mean_of_patches(smoothed, grid.patch)


@mask_provider("oracle", source="ours")
class OracleMask(LossMask):
    """Keep high where the network's output changes most: a bound for tables, since it runs the network at every level.

    Each level's output is compared with that of everything high, pixel by pixel; all these passes count as its work.
    They begin where the region begins.

    Args:
        tolerance: as in `LossMask`.
        sigma: as in `LossMask`.

    Raises:
        InvalidInput: a tolerance that is NaN or a sigma that is no width; outputs that are no maps.
    """

    image_only = ignores_image = True
    needs = "passes of the network at every level"

    def __init__(self, tolerance: float = 0.02, sigma: float = 2.0) -> None:
        super().__init__()
        check_options("oracle", tolerance=(tolerance, NUMBER), sigma=(sigma, WIDTH))
        self.tolerance, self.sigma = tolerance, sigma

    def first_passes(self, lowest: int) -> frozenset[int]:
        """At every level."""
        return frozenset(range(lowest + 1))

    def losses(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Measured."""
        outputs = first_pass_outputs("mask oracle")
        maps = [
            resize(divergence(outputs[0], outputs[level]), grid.size)
            for level in range(1, grid.max_level + 1)
        ]
        return mean_of_patches(torch.stack(maps, 1), grid.patch)


@mask_provider("gain", source="ours; measured in recipes/voc_deeplab and recipes/camvid_mobilenetv2")
class GainMask(EstimatedMask, LossMask):
    """Keep high where a small network, fitted to images without labels (`cadsurgery.finetune.fit_gain`), expects the
    output to change most.

    It sees the mean of each entering channel in each patch, and how far linear interpolation from every second sample
    misses it there, and works on patches alone, so that it costs hardly anything: a 1x1 convolution, two 3x3, a 1x1.
    Until it is fitted it ranks as `detail` does.

    Args:
        tolerance: as in `LossMask`.
        sigma: as in `LossMask`.
        channels: of the three hidden convolutions; at most 4096.
        seed: of the initial weights, 0 or more.

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
        self.register_buffer("detail", torch.ones(()))  # how much it follows detail: all until it is fitted

    def assemble(self, convolutions: list[nn.Conv2d], device: torch.device) -> nn.Sequential:
        """It sees two patches further by dilation, and begins by adding nothing."""
        one, two, three, last = convolutions
        three.dilation = three.padding = (2, 2)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        return nn.Sequential(one, nn.ReLU(), two, nn.ReLU(), three, nn.ReLU(), last)

    def losses(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Expected."""
        self.require(features, grid)
        return self.expect(self.describe(features, grid.patch))

    def restart(self, seed: int) -> None:
        """Forget what was learned: the same layers, with the initial weights of a seed, to be fitted."""
        first, *_, last = (layer for layer in self.estimator if isinstance(layer, nn.Conv2d))
        self.seed, self.estimator = seed, nn.Sequential()
        self._make(first.in_channels, last.out_channels, first.weight.device)
        self.detail.zero_()

    def describe(self, features: Tensor, patch: int) -> Tensor:
        """(B, 2 C, ceil(h / patch), ceil(w / patch)), at least float32: of each channel the mean in each patch, then
        the root of the mean square that interpolation misses."""
        error = missed(features)
        return torch.cat(
            [mean_of_patches(features.to(error), patch), mean_of_patches(error.square(), patch).sqrt()], 1
        )

    def expect(self, described: Tensor) -> Tensor:
        """(B, lowest level, ...): the losses of patches that are described so."""
        logs = self.estimator(described.to(next(self.estimator.parameters()).dtype)).to(described)
        error = described[:, described.shape[1] // 2 :].square().sum(1, keepdim=True)
        return (logs + self.detail.to(described) * error.clamp(min=torch.finfo(error.dtype).tiny).log()).exp()
