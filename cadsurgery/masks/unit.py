"""The unit in which masks see pictures, so that a threshold means the same on every network.

It is the unit of the published thresholds: RGB in 0..1, minus ImageNet's mean, divided by its standard deviation. If
there are not three channels, each is normalised by the average of these means and of these deviations.
"""

from __future__ import annotations

import math
import threading
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cadsurgery.data.channels import per_channel
from cadsurgery.data.networks import IMAGENET_MEAN, IMAGENET_STD
from cadsurgery.elements.sizes import constant
from cadsurgery.support.device_checks import is_capturing
from cadsurgery.support.errors import CadWarning, InvalidInput, UnknownName
from cadsurgery.support.running import running

RAW = "raw"  # the user's word for masks that see the network's input unchanged
BANDS = "bands"  # the user's word for the mean and deviation of each band of a command's pictures
_EXAMPLE = '((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), or "raw" for masks that see the input as it comes'
_FIRST_PICTURE = threading.Lock()
# Of the mean of pictures, in their deviations: fog has less, a mean divided by 1/255 more.
_MOST_DEVIATIONS = 50


@dataclass(frozen=True)
class Normalisation:
    """How a network's input is computed from a picture in 0..1: minus the mean, divided by the standard deviation.

    Attributes:
        mean: one value per channel, or one for all; empty if masks see the input unchanged.
        std: likewise.
        origin: how the normalisation is known, for reports.
        is_fitted: True if both were chosen so that the first picture has the mean and deviation of the unit.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    origin: str = ""
    is_fitted: bool = False

    def __post_init__(self) -> None:
        numbers = all(math.isfinite(value) for value in (*self.mean, *self.std))
        if len(self.mean) != len(self.std) or not numbers or any(value <= 0 for value in self.std):
            raise InvalidInput(
                f"mean {self.mean} and standard deviation {self.std} are no normalisation.",
                why="there must be one of each for every channel, or one of each for all; deviations are above 0.",
                next=f"give (mean, std) of pictures in 0..1: {_EXAMPLE}.",
            )

    def in_unit(self, image: Tensor) -> Tensor:
        """Convert an input (B, C, H, W) to the unit of masks; the dtype stays.

        An input normalised by ImageNet's mean and deviation is returned unchanged, bit for bit.
        """
        scale, shift = self._to_unit(image.shape[1])
        if all(value == 1 for value in scale) and not any(shift):
            return image
        wide = image.to(torch.promote_types(image.dtype, torch.float32))
        factors, terms = (
            constant(tuple(values), wide.dtype, wide.device).view(-1, 1, 1) for values in (scale, shift)
        )
        return (wide * factors + terms).to(image.dtype)

    @property
    def deviation(self) -> float:
        """The stated standard deviation of pictures in the unit of masks; 1, that of photos, if it is not below.

        Pictures that use a small part of their range, such as 12 bits in files of 16, have a small one. Without a mean,
        or with one that is many times as large, a deviation is a scale, such as 1/255, and says nothing of pictures.
        """
        is_scale = not self.mean or self.is_fitted or min(self.mean) <= 0
        if is_scale or max(self.mean) > _MOST_DEVIATIONS * min(self.std):
            return 1.0
        scale, _ = self._to_unit(len(self.mean))
        return min(1.0, sum(scale) / len(scale))

    def _to_unit(self, channels: int) -> tuple[list[float], list[float]]:
        """Return the factor and the offset of each channel."""
        if not self.mean:
            return [1.0] * channels, [0.0] * channels
        of_input, of_unit = (
            [per_channel(values, channels) for values in pair]
            for pair in ((self.mean, self.std), (IMAGENET_MEAN, IMAGENET_STD))
        )
        scale = [ours / theirs for ours, theirs in zip(of_input[1], of_unit[1], strict=True)]
        apart = zip(of_input[0], of_unit[0], of_unit[1], strict=True)
        return scale, [(ours - theirs) / std for ours, theirs, std in apart]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        fitted = {"is_fitted": True} if self.is_fitted else {}
        return {"mean": list(self.mean), "std": list(self.std), "origin": self.origin, **fitted}

    def __str__(self) -> str:
        if not self.mean:
            return f"the input as it comes ({self.origin})"
        mean, std = ("/".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return f"pictures of mean {mean}, standard deviation {std} ({self.origin})"


AS_IT_COMES = Normalisation(origin="asked for")


def read_normalisation(value: object, channels: int) -> Normalisation:
    """Read a user's normalisation: (mean, std), each a number or one per channel; a name, "imagenet", "none" (pictures
    in 0..1 are taken as they are) or "raw" (masks see the input as it comes); or a `Normalisation`.

    Raises:
        InvalidInput: another type or number of channels, a value is not finite, or a deviation is not above 0.
    """
    if isinstance(value, Normalisation):
        return value
    if isinstance(value, str):
        return _named(value)
    try:
        mean, std = (_numbers(part) for part in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise InvalidInput(
            f"{value!r:.80} is no normalisation.", next=f"give (mean, std) of pictures in 0..1: {_EXAMPLE}."
        ) from None
    if len(mean) == len(std) and len(mean) not in (1, channels):
        raise InvalidInput(
            f"the normalisation is for {len(mean)} channels, the images have {channels}.",
            next=f"give {channels} means and {channels} standard deviations, or one of each for all channels.",
        )
    return Normalisation(mean, std, "given")


def _named(name: str) -> Normalisation:
    known = {
        RAW: AS_IT_COMES,
        "imagenet": Normalisation(IMAGENET_MEAN, IMAGENET_STD, "given: ImageNet's"),
        "none": Normalisation((0.0,), (1.0,), "given: none"),
    }
    if name == BANDS:
        raise InvalidInput(
            "mean and deviation of the bands are taken from pictures, and there are none here.",
            next="name pictures beside it, or compute them: cadsurgery.images.statistics_of(pictures).",
        )
    if name not in known:
        raise UnknownName("normalisation", name, [*known, BANDS], next=f"or give (mean, std): {_EXAMPLE}.")
    return known[name]


def _numbers(value: Any) -> tuple[float, ...]:
    numbers = (float(value),) if isinstance(value, (int, float)) else tuple(map(float, value))
    if isinstance(value, str) or not numbers:
        raise ValueError(value)
    return numbers


# Usual ranges of pictures; the first one that contains all values is used. Sharpening filters overshoot a little.
_RANGES: tuple[tuple[float, float, str, tuple[float, ...], tuple[float, ...]], ...] = (
    (-0.1, 1.1, "0..1", (0.0,), (1.0,)),
    (-1.1, 1.1, "-1..1", (0.5,), (0.5,)),
    (-8, 8, "values after mean and deviation", IMAGENET_MEAN, IMAGENET_STD),
    (-16, 272, "0..255", (0.0,), (1 / 255,)),
    (-160, 272, "0..255 minus a mean", IMAGENET_MEAN, (1 / 255,) * 3),
)


def estimate(image: Tensor) -> Normalisation | None:
    """Guess the normalisation of an input (B, C, H, W) from the range of its values.

    For an unusual range, each channel's mean and deviation are mapped to those of the unit. None if the input is not
    a picture but constant or noise.
    """
    values = image.detach().float()
    if not is_picture(values):
        return None
    low, high = (float(value) for value in values.aminmax())
    for least, most, words, mean, std in _RANGES:
        if least <= low and high <= most:
            return Normalisation(mean, std, f"estimated: the first pictures have {words}")
    deviation, centre = torch.std_mean(values.double(), (0, 2, 3), correction=0)
    channels = image.shape[1]
    of_unit = (per_channel(part, channels) for part in (IMAGENET_MEAN, IMAGENET_STD))
    pairs = list(zip(*of_unit, centre.tolist(), deviation.tolist(), strict=True))
    std = tuple(unit / own if own > 0 else 1.0 for _, unit, _, own in pairs)
    mean = tuple(unit - own * ratio for (unit, _, own, _), ratio in zip(pairs, std, strict=True))
    return Normalisation(
        mean, std, f"estimated from the first pictures, of {low:g}..{high:g}", is_fitted=True
    )


def is_picture(values: Tensor) -> bool:
    """True if neighbouring pixels are more alike than distant pixels."""
    if min(values.shape[2:]) < 2 or not bool(values.isfinite().all()):
        return False
    near = [(values.narrow(axis, 1, values.shape[axis] - 1) - values.narrow(axis, 0, values.shape[axis] - 1)).abs()
            for axis in (2, 3)]  # fmt: skip
    far = (values - values.roll([length // 2 for length in values.shape[2:]], (2, 3))).abs().mean()
    return bool((near[0].mean() + near[1].mean()) / 2 < far / 2)


@torch.compiler.assume_constant_result
def _warn_unknown() -> None:
    warnings.warn(
        "the network is compiled before it has seen a picture: its masks see the input as it comes, and what their "
        "thresholds mean depends on that. Call it on a picture once before, or pass adaptify(normalisation=).",
        CadWarning,
        stacklevel=2,
    )


class Unit:
    """Converts a network's input to the unit of masks; its normalisation is set by the first picture at the latest.

    Copies of a network share this object, because their inputs have the same normalisation.
    """

    def __init__(self, normalisation: Normalisation | None = None) -> None:
        """Start with a known normalisation, or None to estimate it from the first picture."""
        self.normalisation = normalisation

    def __call__(self, image: Tensor) -> Tensor:
        """Convert an input (B, C, H, W); it is returned unchanged as long as no picture has been seen."""
        if self.normalisation is None and running.in_graph:
            _warn_unknown()  # an exported graph keeps the input unchanged; a compiled one is made again later
        elif self.normalisation is None and not image.is_meta and not is_capturing(image.device):
            self.set_once(estimate(image))
        return image if self.normalisation is None else self.normalisation.in_unit(image)

    @property
    def deviation(self) -> float:
        """The stated standard deviation of pictures, see `Normalisation.deviation`; 1 before the first picture."""
        return 1.0 if self.normalisation is None else self.normalisation.deviation

    def set_once(self, normalisation: Normalisation | None) -> None:
        """Set the normalisation unless one is known; the first thread wins."""
        with _FIRST_PICTURE:
            if self.normalisation is None:
                self.normalisation = normalisation

    def __deepcopy__(self, memo: dict[int, Any]) -> Unit:
        return self
