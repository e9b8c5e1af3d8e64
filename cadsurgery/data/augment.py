"""Random augmentation of training images, reproducible by seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cadsurgery.data.datasets import IGNORED
from cadsurgery.data.networks import IMAGENET_MEAN
from cadsurgery.support.errors import InvalidInput

if TYPE_CHECKING:
    from torchvision.transforms import v2


@dataclass(frozen=True)
class Augment:
    """Random scale, crop, colour jitter and horizontal flip, in this order.

    The defaults are the published ones (Hesse et al., CVPRW 2023, training on Cityscapes), which do not scale.

    Attributes:
        crop: side, or (height, width), in pixels; smaller images are padded with ignored labels. None: no crop.
        flip: probability of a mirrored image.
        jitter: strength of colour jitter: brightness, contrast and saturation are each multiplied by a factor of
            1 - jitter .. 1 + jitter. Pictures of other bands than grey or red, green and blue have no saturation.
        scale: (low, high) bounds of the factor by which the image is resized before the crop.
        fill: colour of padded pixels, a value for each channel. None: ImageNet's mean for three channels, for others
            the mean of each channel of the picture.
    """

    crop: int | tuple[int, int] | None = 768
    flip: float = 0.5
    jitter: float = 0.5
    scale: tuple[float, float] | None = None
    fill: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if not 0 <= self.flip <= 1 or not 0 <= self.jitter <= 1:
            raise InvalidInput(f"flip={self.flip} or jitter={self.jitter} is not in 0..1.", next="e.g. 0.5.")
        if self.crop is not None and min(self.size or ()) < 1:
            raise InvalidInput(
                f"a crop of {self.crop} has no pixels.", next="give a positive size, e.g. 768."
            )
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1]:
            raise InvalidInput(f"scale={self.scale} is no range of factors.", next="e.g. (0.5, 2.0).")

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the result; None if the image keeps its size."""
        return (self.crop, self.crop) if isinstance(self.crop, int) else self.crop

    def __call__(self, image: Tensor, labels: Tensor, seed: int | torch.Generator) -> tuple[Tensor, Tensor]:
        """Augment an image and its labels; torch's global random state is not used or changed.

        Args:
            image: (C, H, W) in 0..1.
            labels: (H, W) int64.
            seed: a number, or a generator from which the seed is drawn.

        Returns:
            Image and labels of `size`.

        Raises:
            InvalidInput: `fill` has not one value for each channel.
        """
        from torchvision import tv_tensors

        if isinstance(seed, torch.Generator):
            seed = int(torch.randint(2**62, (), generator=seed))
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the other devices
            new_image, new_labels = self._transform(image)(tv_tensors.Image(image), tv_tensors.Mask(labels))
        return new_image.as_subclass(Tensor), new_labels.as_subclass(Tensor)

    def _transform(self, image: Tensor) -> v2.Transform:
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        steps: list[v2.Transform] = []
        if self.scale is not None:
            steps.append(v2.ScaleJitter((image.shape[1], image.shape[2]), self.scale))
        if self.size is not None:
            fill = {tv_tensors.Image: self._fill_of(image), tv_tensors.Mask: IGNORED}
            steps.append(v2.RandomCrop(self.size, pad_if_needed=True, fill=fill))
        if self.jitter:
            is_colour = len(image) in (1, len(IMAGENET_MEAN))  # what torchvision takes
            steps.append(v2.ColorJitter(*[self.jitter] * 3) if is_colour else self._jitter_bands)
        steps.append(v2.RandomHorizontalFlip(self.flip))
        return v2.Compose(steps)

    def _fill_of(self, image: Tensor) -> list[float]:
        if self.fill is None:
            bands: list[float] = image.mean((1, 2)).tolist()
            return list(IMAGENET_MEAN) if len(image) == len(IMAGENET_MEAN) else bands
        if len(self.fill) != len(image):
            raise InvalidInput(
                f"fill has {len(self.fill)} values, and the picture has {len(image)} channels.",
                next="give a value for each channel; without fill each channel is filled by its mean.",
            )
        return list(self.fill)

    def _jitter_bands(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Jitter brightness and contrast, in random order, as torchvision does it for grey pictures."""
        low, high = min(0.0, float(image.min())), max(1.0, float(image.max()))
        brightness, contrast = torch.empty(2).uniform_(1 - self.jitter, 1 + self.jitter)
        for change in torch.randperm(2).tolist():
            around = image.mean() if change else 0.0
            image = (around + (contrast if change else brightness) * (image - around)).clamp(low, high)
        return image, labels
